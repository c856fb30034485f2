"""Magnitude, Wanda and the table against plain loops."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from megamask.config.tree import OneShotMethod, PruneSection
from megamask.errors import ConfigError
from megamask.oneshot.criteria import CRITERIA
from megamask.oneshot.magnitude import magnitude
from megamask.oneshot.stats import InputStats
from megamask.oneshot.wanda import wanda
from megamask.sparsity.pattern import Pattern

PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8)]


def plain_mask(score: list[list[float]], n: int, m: int) -> torch.Tensor:
    """Keep the n largest of every m, the earlier position first among equals."""
    mask = torch.zeros(len(score), len(score[0]), dtype=torch.bool)
    for o, row in enumerate(score):
        for start in range(0, len(row), m):
            order = sorted(range(start, start + m), key=lambda i: (-row[i], i))
            mask[o, order[:n]] = True
    return mask


def example() -> tuple[torch.Tensor, torch.Tensor, InputStats]:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(12, 32, generator=generator)
    x_TI = (
        torch.randn(100, 32, generator=generator)
        * torch.logspace(-1.5, 1.5, 32)[torch.randperm(32, generator=generator)]
    )
    stats = InputStats(32, hessian=False)
    stats.add(x_TI)
    return weight_OI, x_TI, stats


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitude(pattern: Pattern, dtype: torch.dtype) -> None:
    weight_OI = example()[0].to(dtype)
    pruned = magnitude(weight_OI, pattern)
    assert pruned.weight_OI is None
    assert torch.equal(
        pruned.mask_OI, plain_mask(weight_OI.double().abs().tolist(), pattern.n, pattern.m)
    )
    assert pattern.is_valid(pruned.mask_OI)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_wanda(pattern: Pattern) -> None:
    weight_OI, x_TI, stats = example()
    score = [
        [abs(w) * x_TI[:, i].double().norm().item() for i, w in enumerate(row)]
        for row in weight_OI.tolist()
    ]
    pruned = wanda(weight_OI, stats, pattern)
    # fp32 against fp64 scores: no two scores of this seed's groups are as near as rounding (1e-7),
    # so masks are equal
    assert torch.equal(pruned.mask_OI, plain_mask(score, pattern.n, pattern.m))
    assert pruned.weight_OI is None
    assert not torch.equal(pruned.mask_OI, magnitude(weight_OI, pattern).mask_OI)
    wrong = [
        [abs(w) * x_TI[:, i].double().square().sum().item() for i, w in enumerate(row)]
        for row in weight_OI.tolist()
    ]
    assert not torch.equal(
        pruned.mask_OI, plain_mask(wrong, pattern.n, pattern.m)
    )  # a forgotten square root shows


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_ties_go_to_the_earlier_position(name: str) -> None:
    stats = InputStats(8, hessian=True)
    stats.add(torch.eye(8))
    mask_OI = CRITERIA[name].prune(torch.ones(3, 8), stats, Pattern(2, 4), PruneSection()).mask_OI
    assert torch.equal(mask_OI, torch.tensor([[True, True, False, False] * 2] * 3))


def test_table_covers_the_settings() -> None:
    assert set(CRITERIA) == set(get_args(OneShotMethod))
    weight_OI, x_TI, plain_stats = example()
    stats = InputStats(32, hessian=True)
    stats.add(x_TI)
    for criterion in CRITERIA.values():
        given = stats if criterion.needs_hessian else plain_stats if criterion.needs_stats else None
        pruned = criterion.prune(weight_OI, given, Pattern(2, 4), PruneSection())
        assert Pattern(2, 4).is_valid(pruned.mask_OI)
        assert (pruned.weight_OI is not None) == criterion.updates_weight


def test_check_refuses_a_block_before_calibration() -> None:
    settings = PruneSection(block=20)
    CRITERIA["sparsegpt"].check(Pattern(2, 4), settings)
    CRITERIA["magnitude"].check(Pattern(4, 8), settings)
    with pytest.raises(
        ConfigError, match=r"prune\.block = 20.*multiple of M, here 8.*prune\.block=16"
    ):
        CRITERIA["sparsegpt"].check(Pattern(4, 8), settings)


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_refuses_a_row_that_m_does_not_divide(name: str) -> None:
    stats = InputStats(10, hessian=True)
    stats.add(torch.randn(20, 10))
    with pytest.raises(ConfigError, match="must divide in_features, here 10"):
        CRITERIA[name].prune(torch.ones(3, 10), stats, Pattern(2, 4), PruneSection())
