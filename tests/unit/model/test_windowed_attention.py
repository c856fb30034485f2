"""Attention with a window or capped scores: the kernel that a window can take on CUDA, and the
memory that both need.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from benchmarks.allocations import peak_bytes
from megamask.config.load import build_config
from megamask.model.build import build_model, masked_linears
from megamask.model.layer_parts import SdpaCoreAttention
from megamask.parallel.mesh import start
from megamask.plan.capped_attention import in_attention, kept_scores, within_backward
from megamask.plan.hardware import device_named
from megamask.plan.saved_tensors import saved_activations, window_activations
from megamask.plan.workload import Workload
from megamask.weights.architecture import read_architecture
from megamask.weights.family import Architecture, Layer

TINY = Path(__file__).resolve().parents[3] / "configs" / "models" / "tiny-llama.json"
S, B, WINDOW = 64, 2, 16


@pytest.mark.parametrize("window", [None, WINDOW, S])
def test_a_mask_comes_with_keys_for_every_head(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    """On CUDA the flash kernel takes no mask and the memory-efficient kernel no groups: with both,
    PyTorch makes S x S scores of every head.
    """
    calls: list[tuple[bool, bool, bool]] = []
    whole = torch.nn.functional.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **more: Any) -> torch.Tensor:
        same = q.shape == k.shape == v.shape
        calls.append((more["attn_mask"] is not None, more["enable_gqa"], same))
        return whole(q, k, v, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    noise = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(S, B, heads, 8, generator=noise) for heads in (8, 2, 2))
    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=8)
    found = SdpaCoreAttention(config, 1, None, "self", window=window)(q, k, v)
    cut = window == WINDOW
    assert calls == [(True, False, True) if cut else (False, True, False)]
    ages = torch.arange(S)[:, None] - torch.arange(S)
    seen = (ages >= 0) & (ages < (window or S))
    wide = [one.repeat_interleave(4, 2) for one in (k, v)]
    scores = torch.einsum("sbhd,tbhd->bhst", q, wide[0]) / 8**0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = torch.einsum("bhst,tbhd->sbhd", weights, wide[1]).flatten(2)
    assert torch.allclose(found, expected, atol=1e-5)  # rounding of fp32 is 1e-6
    neighbours = torch.einsum("bhst,tbhd->sbhd", weights, wide[1].roll(1, 2)).flatten(2)
    assert not torch.allclose(found, neighbours, atol=1e-5)


def saved_bytes(arch: Architecture) -> int:
    """Bytes of all tensors that a forward pass keeps for the backward pass."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    config = build_config({"device": "cpu", "dtype": "fp32", "parallel": {"threads": 1}})
    with start(config) as mesh:
        model = build_model(config, arch, mesh)
        for linear in masked_linears(model).values():
            linear.weight.requires_grad_(True)
        tokens_BS = torch.randint(512, (B, S), generator=torch.Generator().manual_seed(0))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = model.token_losses(tokens_BS, tokens_BS.roll(-1, 1))
        assert losses.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


CHANGES: list[dict[str, Any]] = [{}, {"kv_heads": 2}, {"kv_heads": 2, "qk_norm": "head"}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_the_plan_counts_what_a_window_keeps(changes: dict[str, Any]) -> None:
    """The first layer has a window that cuts keys off, the second has a window of all keys."""
    plain = replace(read_architecture(TINY), **changes)
    windowed = replace(plain, layers=(Layer(0, WINDOW), Layer(0, S)))
    settings = {"data": {"seq_length": S}, "learn": {"micro_batch": B}, "dtype": "fp32"}
    work = Workload(build_config(settings), windowed)
    more = saved_bytes(windowed) - saved_bytes(plain)
    planned = sum(window_activations(work, layer) for layer in (0, 1))
    assert planned == more >= 4 * S * S
    assert window_activations(work, 1) == 0


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_the_plan_counts_what_a_cap_keeps(changes: dict[str, Any]) -> None:
    plain = replace(read_architecture(TINY), **changes)
    capped = replace(plain, attention_cap=5.0)
    settings = {"data": {"seq_length": S}, "learn": {"micro_batch": B}, "dtype": "fp32"}
    planned = [
        saved_activations(Workload(build_config(settings), arch), device_named("cpu"))
        for arch in (capped, plain)
    ]
    more = saved_bytes(capped) - saved_bytes(plain)
    assert planned[0] - planned[1] == more >= 2 * 8 * B * 8 * S * S  # layers, bytes, heads


@pytest.mark.parametrize(("dtype", "width"), [("fp32", 4), ("bf16", 2)])
def test_the_plan_counts_what_capped_attention_makes(dtype: str, width: int) -> None:
    """Without a backward pass, and beside the kept tensors within it; a hundredth is the mask."""
    arch = replace(read_architecture(TINY), attention_cap=5.0, heads=8, kv_heads=8, head_dim=4)
    settings = {"data": {"seq_length": 256}, "learn": {"micro_batch": B}, "dtype": dtype}
    work = Workload(build_config(settings), arch)
    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=8)
    attention = SdpaCoreAttention(config, 1, None, "self", cap=5.0)
    kind = {4: torch.float32, 2: torch.bfloat16}[width]
    q, k, v = (torch.randn(256, B, 8, 4, dtype=kind, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        made = peak_bytes(lambda: attention(q, k, v))
    assert made == pytest.approx(in_attention(work), rel=0.05)
    kept: list[torch.Tensor] = []
    forward = peak_bytes(lambda: kept.append(attention(q, k, v).sum()))
    backward = peak_bytes(kept[0].backward)
    assert backward == pytest.approx(within_backward(work), rel=0.05)
    assert forward < kept_scores(work) + within_backward(work)
    assert made != pytest.approx(in_attention(work) - width * B * 8 * 256**2, rel=0.05)
