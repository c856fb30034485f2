"""Weights that are trained under a mask: what they are, and where their gradients go."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megamask.config import load_config
from megamask.recovery.trained_weights import KeptWeights, LowRank, TrainedWeight
from megamask.recovery.training import Lora
from megamask.sparsity.pattern import Pattern


def linear(shard_axis: int = 0, size: int = 1, rank: int = 0) -> Any:
    """A linear of 6 x 8, or its shard."""
    whole_OI = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    group = SimpleNamespace(size=lambda: size, rank=lambda: rank)
    shard_OI = whole_OI.chunk(size, dim=shard_axis)[rank].contiguous()
    return SimpleNamespace(weight=shard_OI, shard_axis=shard_axis, tp_group=group)


def made(kind: str, one: Any) -> tuple[TrainedWeight, torch.Tensor]:
    mask_OI = Pattern(2, 4).best(one.weight.abs())
    if kind == "kept":
        return KeptWeights(one, mask_OI), mask_OI
    return LowRank(one, mask_OI, rank=2, scale=3.0, seed=5), mask_OI


@pytest.mark.parametrize("kind", ["kept", "low rank"])
def test_training_starts_at_the_masked_weight_and_keeps_every_zero(kind: str) -> None:
    trained, mask_OI = made(kind, one := linear())
    assert torch.equal(trained.weight(), torch.where(mask_OI, one.weight, 0))
    optimizer = torch.optim.Adam(trained.parameters, lr=0.1)
    target_OI = torch.randn(6, 8, generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (trained.weight() - target_OI)[mask_OI].square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        outside = trained.weight()[~mask_OI]
        assert not outside.any() and not torch.signbit(outside).any()
    assert losses[-1] < 0.5 * losses[0]
    if isinstance(trained, KeptWeights):
        assert not trained.kept_OI[~mask_OI].any()
    else:
        assert isinstance(trained, LowRank)
        a_RI, b_OR = trained.parameters
        expected_OI = mask_OI * (one.weight + 3.0 * (b_OR @ a_RI))
        assert torch.equal(trained.weight(), expected_OI)
        # The merge that LoRA has without a mask brings the removed weights back.
        assert (one.weight * mask_OI + 3.0 * b_OR @ a_RI)[~mask_OI].abs().max() > 0.01


@pytest.mark.parametrize("kind", ["kept", "low rank"])
def test_rows_without_a_removed_weight_stay_frozen(kind: str) -> None:
    """Such rows are of a part of a fused linear that has no mask: the written weights keep them, so
    the measured weights must.
    """
    one = linear()
    mask_OI = Pattern(2, 4).best(one.weight.abs())
    mask_OI[2:4] = True
    trained: TrainedWeight = (
        KeptWeights(one, mask_OI)
        if kind == "kept"
        else LowRank(one, mask_OI, rank=2, scale=3.0, seed=5)
    )
    optimizer = torch.optim.Adam(trained.parameters, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        trained.weight().square().sum().backward()
        optimizer.step()
    weight_OI = trained.weight()
    assert torch.equal(weight_OI[2:4], one.weight[2:4])
    assert (weight_OI != one.weight * mask_OI).any(dim=1).tolist() == [True] * 2 + [False] * 2 + [
        True
    ] * 2


def test_the_shards_of_a_low_rank_change_are_those_of_the_whole() -> None:
    whole, _ = made("low rank", linear())
    for axis in (0, 1):
        parts = [made("low rank", linear(axis, size=2, rank=rank))[0] for rank in (0, 1)]
        factors = [part.parameters[0] for part in parts]
        joined = torch.cat(factors, dim=1) if axis == 1 else factors[1]
        assert torch.equal(joined, whole.parameters[0])
        assert parts[0].is_shared == ([True, False] if axis == 0 else [False, True])


def test_the_start_of_lora_depends_on_seed_and_linear() -> None:
    """PyTorch's generator takes 32 bits of a seed."""
    one = linear()
    mask_OI = Pattern(2, 4).best(one.weight.abs())
    starts = set()
    for seed, number in product((0, 1, 2**32 - 1), (0, 0xDEADBEEF)):
        trained = Lora().trained(load_config(None, [f"seed={seed}"]), one, mask_OI, number)
        assert isinstance(trained, LowRank)
        starts.add(tuple(trained.a_RI.flatten().tolist()))
    assert len(starts) == 6
