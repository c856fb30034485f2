"""Orders of channels, judged by the tensors that they make."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megamask.oneshot import channel_search
from megamask.oneshot.channel_search import Found, InputMoments, find_orders
from megamask.oneshot.value_rotation import _learned, _loss, find_rotations
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.pattern_plan import PatternPlan
from megamask.sparsity.regroup import lost, regrouped
from megamask.weights.architecture import Architecture, read_architecture
from megamask.weights.channel_orders import reordered
from megamask.weights.hf_files import HFReader, open_checked
from megamask.weights.mapping import expected_tensors, linear_shapes, rules

TINY = Path(__file__).parents[3] / "configs" / "models" / "tiny-llama.json"
PATTERN = Pattern(2, 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights; four query heads share a KV head."""
    folder = tmp_path_factory.mktemp("model")
    facts = {**json.loads(TINY.read_text()), "num_key_value_heads": 2}
    (folder / "config.json").write_text(json.dumps(facts))
    draws = torch.Generator().manual_seed(0)
    shapes = expected_tensors(read_architecture(folder))
    tensors = {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def ones(arch: Architecture) -> dict[str, torch.Tensor]:
    """Mean squares of inputs that are all 1."""
    return {
        rule.megatron.removesuffix(".weight"): torch.ones(rule.shapes[0][-1])
        for rule in rules(arch)
        if rule.is_linear
    }


def search(
    reader: HFReader,
    arch: Architecture,
    modules: list[str] | None = None,
    pattern: Pattern = PATTERN,
    mean_square: dict[str, torch.Tensor] | None = None,
) -> Found:
    modules = list(linear_shapes(arch)) if modules is None else modules
    mean_square = ones(arch) if mean_square is None else mean_square
    plan = PatternPlan.uniform(modules, pattern)
    return find_orders(reader, arch, plan, mean_square, torch.device("cpu"))


def test_the_shares_are_those_of_the_new_tensors(model: Path) -> None:
    """With inputs of 1 the importance is the square of the weight, so the tensors tell the shares
    again, and the query heads of a KV head must have moved together.
    """
    arch = read_architecture(model)
    with open_checked(model) as reader:
        found = search(reader, arch)
        after = {name: one.square() for name, one in reordered(reader, arch, found.orders)}

    def share(importance_RC: torch.Tensor) -> float:
        return lost(importance_RC, PATTERN) / float(importance_RC.sum())

    layers = [f"model.layers.{number}." for number in range(arch.num_layers)]
    attention = [f"self_attn.{one}_proj" for one in "qkv"]
    stream = [*attention, "mlp.gate_proj", "mlp.up_proj"]
    expected = {
        "ffn": [share(after[f"{layer}mlp.down_proj.weight"]) for layer in layers],
        "value": [
            share(columns)
            for layer in layers
            for columns in after[f"{layer}self_attn.o_proj.weight"].chunk(arch.kv_heads, dim=1)
        ],
        "hidden": [
            share(torch.cat([after[f"{a}{b}.weight"] for a in layers for b in stream])),
        ],
    }
    for kind, shares in expected.items():
        # sums in fp32, and the order of rows differs
        assert [new for _, new in found.shares[kind]] == pytest.approx(shares, rel=1e-5), kind
        assert all(new < old for old, new in found.shares[kind]), kind


def test_linears_that_stay_dense_have_no_say(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_search, "regrouped", partial(regrouped, rounds=1))
    arch = read_architecture(model)
    with open_checked(model) as reader:
        mlp = [name for name in linear_shapes(arch) if "mlp" in name]
        found = search(reader, arch, mlp)
        assert set(found.shares) == {"ffn", "hidden"} and not found.orders.value
        only = search(reader, arch, [name for name in mlp if "1.mlp.down" in name])
        assert set(only.orders.ffn) == {1} and only.orders.hidden is None
        # 16 divides the stream and the feed-forward part, and no head of 8.
        wide = search(reader, arch, pattern=Pattern(8, 16))
        assert set(wide.shares) == {"ffn", "hidden"}


def test_a_weight_counts_by_the_square_of_its_input(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four inputs of a group are far larger than all others: a mask must lose two of them in each
    row, and none once they are dealt to two groups.
    """
    monkeypatch.setattr(channel_search, "regrouped", partial(regrouped, rounds=1))
    arch, name = read_architecture(model), "model.layers.1.mlp.down_proj"
    large = ones(arch)
    large["decoder.layers.1.mlp.linear_fc2"][:4] = 1e4
    with open_checked(model) as reader:
        ((before, after),) = search(reader, arch, [name], mean_square=large).shares["ffn"]
        ((all_alike, dealt),) = search(reader, arch, [name]).shares["ffn"]
        importance_OI = reader.tensor(f"{name}.weight").square()
    importance_OI[:, :4] *= 1e4
    # fp32 sums of 8,192 terms
    assert before == pytest.approx(lost(importance_OI, PATTERN) / float(importance_OI.sum()), 1e-4)
    assert after < before / 10 and dealt > all_alike / 2


def test_the_rows_of_a_search_hold_no_others(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view of every second row would keep the importance of the whole model in memory."""
    monkeypatch.setattr(channel_search, "regrouped", partial(regrouped, rounds=1))
    monkeypatch.setattr(channel_search, "STREAM_ROWS", 64)
    joined: list[list[torch.Tensor]] = []
    cat = torch.cat

    def recorded(tensors: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
        joined.append(list(tensors))
        return cat(tensors, dim)

    monkeypatch.setattr(torch, "cat", recorded)
    arch = read_architecture(model)
    with open_checked(model) as reader:
        search(reader, arch)
    (stream,) = [parts for parts in joined if len(parts) == 2 * arch.num_layers]
    assert sum(len(one) for one in stream) <= 64 + len(stream)
    assert all(one.untyped_storage().nbytes() == one.nbytes for one in stream)


def test_rotated_values_lose_less(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second search gives the same bits, and the new tensors tell the shares again."""
    monkeypatch.setattr(channel_search, "regrouped", partial(regrouped, rounds=1))
    arch = read_architecture(model)
    heads, channels = arch.heads, arch.head_dim
    factor = torch.randn(heads, channels, channels, generator=torch.Generator().manual_seed(1))
    moment = factor @ factor.mT
    names = [name for name in ones(arch) if name.endswith("linear_proj")]
    moments = InputMoments(ones(arch), dict.fromkeys(names, moment))
    results = []
    with open_checked(model) as reader:
        for _ in range(2):
            found = search(reader, arch)
            plan = PatternPlan.uniform(list(linear_shapes(arch)), PATTERN)
            of = (reader, arch, plan, moments, found)
            find_rotations(*of, torch.device("cpu"))
            results.append(found)
        orders = results[0].orders
        after = dict(reordered(reader, arch, orders))
        before = dict(reordered(reader, arch, replace(orders, rotation={})))
    assert set(orders.rotation) == set(range(arch.num_layers))
    for layer, rotation in orders.rotation.items():
        assert torch.equal(rotation, results[1].orders.rotation[layer])
        # an fp32 solution of equations
        torch.testing.assert_close(
            rotation @ rotation.mT,
            torch.eye(channels).double().expand_as(rotation),
            atol=1e-5,
            rtol=0,
        )
        per = heads // arch.kv_heads
        order = orders.value[layer].repeat_interleave(per, 0)
        held = torch.stack([one[at][:, at] for one, at in zip(moment, order, strict=True)])
        wide = rotation.float().repeat_interleave(per, 0)
        turned = (wide.mT @ held @ wide).diagonal(dim1=1, dim2=2).flatten()
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        total = float((before[name].square() * held.diagonal(dim1=1, dim2=2).flatten()).sum())
        old, new = results[0].shares["rotated"][layer]
        assert lost(after[name].square() * turned, PATTERN) / total == pytest.approx(new, rel=1e-4)
        assert new < 0.9 * old


def test_values_in_which_two_of_four_weights_are_zero_are_found_again() -> None:
    """A sparse projection that a rotation hides loses less than the start, by far."""
    draws = torch.Generator().manual_seed(2)
    sparse = torch.randn(1, 1, 64, 8, generator=draws) * torch.tensor([1.0, 1, 0, 0] * 2)
    hidden = torch.linalg.qr(torch.randn(8, 8, generator=draws)).Q
    loss = _loss(sparse @ hidden, torch.eye(8)[None, None], None, None, PATTERN)
    stay, rotation = torch.eye(8)[None], _learned(loss, 1, 8, torch.device("cpu"))
    print(float(loss(stay)[0]), float(loss(rotation)[0]))
    assert float(loss(hidden.mT[None])[0]) < 1e-10
    assert float(loss(rotation)[0]) < float(loss(stay)[0]) / 2
