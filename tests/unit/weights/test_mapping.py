"""The mapping table in pure torch: HF -> each rank's Megatron tensor -> full -> HF, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megamask.errors import ConfigError
from megamask.weights.architecture import Architecture
from megamask.weights.mapping import (
    block,
    check_tp,
    expected_tensors,
    linear_shapes,
    prunable,
    rules,
)
from megamask.weights.rule import Piece, Read, Rule

TINY = Architecture(
    "llama",
    num_layers=2,
    hidden=32,
    ffn=64,
    heads=16,
    kv_heads=8,
    head_dim=4,
    vocab=50,
    max_positions=64,
    tied=False,
)
BIASED = replace(TINY, attention_bias=True, attention_out_bias=True, mlp_bias=True, tied=True)
WIDE_HEADS = replace(TINY, head_dim=6)  # heads * head_dim != hidden
ONE_TENSOR = replace(TINY, family="phi3", kv_heads=2)  # q, k, v in one HF tensor; ranks share KV


def random_checkpoint(arch: Architecture, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator)
        for name, shape in expected_tensors(arch).items()
    }


def reader(tensors: dict[str, Tensor]) -> Read:
    return lambda name, rows, cols: block(tensors[name], rows, cols)


def to_megatron(rule: Rule, tensors: dict[str, Tensor]) -> Tensor:
    """The full (TP = 1) Megatron tensor from whole HF tensors."""
    return rule.shard(reader(tensors), 0, 1)


def of_pieces(pieces: list[Piece], tensors: dict[str, Tensor], shard: Tensor) -> Tensor:
    """The rows that the pieces name, one after another."""
    read = reader(tensors)
    return torch.cat(
        [
            shard.new_zeros(piece.rows.stop, *shard.shape[1:])
            if piece.hf is None
            else read(piece.hf, piece.rows, piece.cols)
            for piece in pieces
        ]
    )


def padded(arch: Architecture, tp: int) -> int:
    return -(-arch.vocab // tp) * tp


@pytest.mark.parametrize(
    "arch",
    [TINY, BIASED, WIDE_HEADS, ONE_TENSOR],
    ids=["untied", "tied, biases", "head_dim", "fused"],
)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_round_trip_is_bitwise(arch: Architecture, tp: int) -> None:
    source, back = random_checkpoint(arch), {}
    for rule in rules(arch, padded(arch, tp)):
        shards = [rule.shard(reader(source), rank, tp) for rank in range(tp)]
        assert {tuple(shard.shape) for shard in shards} == {rule.shape(tp)}
        full = rule.join(shards)
        assert torch.equal(full, to_megatron(rule, source)) and full.shape == rule.shape(1)
        for rank, shard in enumerate(shards):
            assert torch.equal(of_pieces(rule.pieces(rank, tp), source, shard), shard), rule
            covered = 0
            for rows, offsets in rule.chunks(rank, tp):
                part = shard[rows]
                assert torch.equal(of_pieces(rule.pieces(rank, tp, rows), source, shard), part)
                ends = zip(offsets, part.shape, strict=True)
                assert torch.equal(full[tuple(slice(at, at + n) for at, n in ends)], part), rule
                covered += len(part)
            assert covered == len(shard)
        back.update(rule.to_hf(full))
    assert back.keys() == source.keys()
    assert all(torch.equal(back[name], source[name]) for name in source)


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_masks_indices_and_logits_travel_as_the_weights_do(tp: int) -> None:
    m = 2
    for rule in (rule for rule in rules(TINY) if rule.is_linear):
        generator = torch.Generator().manual_seed(0)
        shapes = dict(zip(rule.hf, rule.shapes, strict=True))
        index_OG = {
            name: torch.randint(6, (o, i // m), generator=generator)
            for name, (o, i) in shapes.items()
        }
        logits_OCG = {
            name: torch.randn(o, 6, i // m, generator=generator) for name, (o, i) in shapes.items()
        }
        for tensors in (index_OG, logits_OCG):
            full = rule.join([rule.shard(reader(tensors), rank, tp, group=m) for rank in range(tp)])
            back = rule.to_hf(full)
            assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_layouts_are_those_of_megatron() -> None:
    """Written out by hand: rows of the second KV group, and of rank 1's gated fc1."""
    source = random_checkpoint(TINY)
    table = {rule.megatron: rule for rule in rules(TINY)}
    d, per_group = TINY.head_dim, TINY.heads // TINY.kv_heads
    q, k, v = (source[f"model.layers.1.self_attn.{one}_proj.weight"] for one in "qkv")
    qkv = to_megatron(table["decoder.layers.1.self_attention.linear_qkv.weight"], source)
    second = qkv[(per_group + 2) * d : 2 * (per_group + 2) * d]
    assert torch.equal(
        second, torch.cat([q[per_group * d : 2 * per_group * d], k[d : 2 * d], v[d : 2 * d]])
    )
    gate, up = (
        source["model.layers.0.mlp.gate_proj.weight"],
        source["model.layers.0.mlp.up_proj.weight"],
    )
    rank_1 = table["decoder.layers.0.mlp.linear_fc1.weight"].shard(reader(source), 1, 2)
    assert torch.equal(rank_1, torch.cat([gate[32:], up[32:]]))
    down = source["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(
        table["decoder.layers.0.mlp.linear_fc2.weight"].shard(reader(source), 1, 2), down[:, 32:]
    )


def test_a_wrong_interleave_fails() -> None:
    """Plain [q; k; v] is what a table without the per-group interleave would hold: it must not pass
    for the real thing.
    """
    source = random_checkpoint(TINY)
    rule = next(rule for rule in rules(TINY) if rule.kind == "qkv")
    plain = torch.cat([source[name] for name in rule.hf])
    assert plain.shape == rule.shape() and not torch.equal(plain, to_megatron(rule, source))
    back = rule.to_hf(plain)
    assert not any(torch.equal(back[name], source[name]) for name in rule.hf)
    gated = next(rule for rule in rules(TINY) if rule.kind == "gated")
    shards = [gated.shard(reader(source), rank, 2) for rank in range(2)]
    assert not torch.equal(
        torch.cat(shards), gated.join(shards)
    )  # ranks cannot simply be concatenated


def test_only_the_needed_rows_are_read() -> None:
    asked = []

    def read(name: str, rows: slice, cols: slice | None) -> Tensor:
        asked.append((name.rsplit(".", 2)[1], rows, cols))
        return block(source[name], rows, cols)

    source = random_checkpoint(TINY)
    for rule in rules(TINY):
        if rule.megatron.startswith("decoder.layers.0.") and rule.is_linear:
            rule.shard(read, 3, 4)
    assert asked == [
        ("q_proj", slice(48, 64), None),
        ("k_proj", slice(24, 32), None),
        ("v_proj", slice(24, 32), None),
        ("o_proj", slice(0, 32), slice(48, 64)),
        ("gate_proj", slice(48, 64), None),
        ("up_proj", slice(48, 64), None),
        ("down_proj", slice(0, 32), slice(48, 64)),
    ]


def test_vocabulary_padding_is_zeros_and_is_cut_off() -> None:
    source = random_checkpoint(TINY)
    rule = rules(TINY, 128)[0]
    shards = [rule.shard(reader(source), rank, 4) for rank in range(4)]
    assert all(shard.shape == (32, 32) for shard in shards)
    full = rule.join(shards)
    assert torch.equal(full[50:], torch.zeros(78, 32))
    assert torch.equal(
        rule.to_hf(full)["model.embed_tokens.weight"], source["model.embed_tokens.weight"]
    )


def test_tied_models_have_no_head() -> None:
    assert "output_layer.weight" in {rule.megatron for rule in rules(TINY)}
    assert "output_layer.weight" not in {rule.megatron for rule in rules(BIASED)}


@pytest.mark.parametrize("tp", [3, 32])
def test_a_tp_that_does_not_divide_is_refused(tp: int) -> None:
    with pytest.raises(
        ConfigError, match=r"parallel\.tp.*num_attention_heads = 16.*allows 1, 2, 4, 8, 16"
    ):
        check_tp(TINY, tp)
    check_tp(TINY, 8)


def test_ranks_may_share_a_kv_head_but_no_norm_over_all_of_them() -> None:
    check_tp(TINY, 16)
    few = replace(TINY, heads=12, kv_heads=6, ffn=144)
    with pytest.raises(ConfigError, match=r"num_key_value_heads = 6; this model allows 1, 2, 3, 6"):
        check_tp(few, 4)
    check_tp(few, 12)
    with pytest.raises(ConfigError, match=r"num_key_value_heads = 8"):
        check_tp(replace(TINY, qk_norm="all heads"), 16)


def test_fused_files_and_shared_kv_heads_hold_the_rows_of_separate_ones() -> None:
    """Phi-3's fused names hold [q; k; v] and [gate; up]; at TP 16 two ranks share a KV head."""
    fused = replace(TINY, family="phi3")
    source, together = random_checkpoint(TINY), {}
    parts = {"qkv_proj": "qkv", "gate_up_proj": ("gate", "up")}
    for name in expected_tensors(fused):
        stem, _, leaf = name.removesuffix(".weight").rpartition(".")
        ones = [f"{stem}.{one}_proj.weight" for one in parts.get(leaf, ())] or [name]
        together[name] = torch.cat([source[one] for one in ones])
    for separate, rule in zip(rules(TINY), rules(fused), strict=True):
        if rule.kind == "vocab":
            continue
        for tp in (1, 2, 16):
            shards = [rule.shard(reader(together), rank, tp) for rank in range(tp)]
            plain = [separate.shard(reader(source), rank, tp) for rank in range(tp)]
            assert {tuple(shard.shape) for shard in shards} == {rule.shape(tp)}
            assert all(map(torch.equal, shards, plain))
            full = rule.join(shards)
            assert torch.equal(full, to_megatron(separate, source))
            assert all(torch.equal(part, together[name]) for name, part in rule.to_hf(full).items())


def test_prunable_follows_include_and_exclude() -> None:
    assert prunable(TINY, ["*"], []) == list(linear_shapes(TINY)) and len(linear_shapes(TINY)) == 14
    assert prunable(TINY, ["*.mlp.*"], ["model.layers.0.*"]) == [
        f"model.layers.1.mlp.{one}_proj" for one in ("gate", "up", "down")
    ]


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        (
            ["*"],
            ["model.layers.1.self_attn.k_prj"],
            r"model\.exclude.*model\.layers\.1\.self_attn\.k_proj",
        ),
        (["*.mpl.*"], [], r"model\.include"),
        (["*"], ["lm_head"], r"never pruned"),
        (["*"], ["*"], r"at least one linear"),
        (["*"], ["*.k_proj"], r"fuses .*q_proj"),
        (["*.up_proj"], [], r"gate_proj.*prune all of them or none"),
    ],
)
def test_patterns_that_cannot_work_are_refused(
    include: list[str], exclude: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prunable(TINY, include, exclude)
