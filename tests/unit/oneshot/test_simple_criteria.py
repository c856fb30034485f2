"""Magnitude, Wanda and RIA against plain loops, and the registry of criteria."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from megamask.config.tree import OneShotMethod, PruneSection
from megamask.errors import ConfigError
from megamask.oneshot.criteria import CRITERIA
from megamask.oneshot.criterion import Pruned
from megamask.oneshot.stats import GradientStats, InputStats, Statistics
from megamask.sparsity.pattern import Pattern
from tests.masks import is_valid

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


def prune(name: str, weight_OI: torch.Tensor, stats: InputStats, pattern: Pattern) -> Pruned:
    given = Statistics(stats, GradientStats(torch.ones_like(weight_OI), 1))
    return CRITERIA[name].prune(weight_OI, given, pattern, PruneSection())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitude(pattern: Pattern, dtype: torch.dtype) -> None:
    weight_OI = example()[0].to(dtype)
    pruned = CRITERIA["magnitude"].prune(weight_OI, Statistics(), pattern, PruneSection())
    assert pruned.weight_OI is None
    assert torch.equal(
        pruned.mask_OI, plain_mask(weight_OI.double().abs().tolist(), pattern.n, pattern.m)
    )
    assert is_valid(pattern, pruned.mask_OI)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_wanda(pattern: Pattern) -> None:
    weight_OI, x_TI, stats = example()
    score = [
        [abs(w) * x_TI[:, i].double().norm().item() for i, w in enumerate(row)]
        for row in weight_OI.tolist()
    ]
    pruned = prune("wanda", weight_OI, stats, pattern)
    # The scores are fp32 here and fp64 in the loop. In no group of this seed are two scores as near
    # to each other as rounding (1e-7), so the masks are equal.
    assert torch.equal(pruned.mask_OI, plain_mask(score, pattern.n, pattern.m))
    assert pruned.weight_OI is None
    by_magnitude = prune("magnitude", weight_OI, stats, pattern)
    assert not torch.equal(pruned.mask_OI, by_magnitude.mask_OI)
    # A forgotten square root gives another mask.
    wrong = [
        [abs(w) * x_TI[:, i].double().square().sum().item() for i, w in enumerate(row)]
        for row in weight_OI.tolist()
    ]
    assert not torch.equal(pruned.mask_OI, plain_mask(wrong, pattern.n, pattern.m))


def ria_score(
    weight: list[list[float]], norms: list[float], power: float = 0.5, by_row: bool = True
) -> list[list[float]]:
    """The paper's score; ``by_row`` False forgets the sum over the row."""
    columns = [sum(abs(row[i]) for row in weight) for i in range(len(norms))]
    score = []
    for row in weight:
        row_sum = sum(abs(w) for w in row)
        score.append(
            [
                (abs(w) / columns[i] + by_row * abs(w) / row_sum) * norms[i] ** power
                for i, w in enumerate(row)
            ]
        )
    return score


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_ria(pattern: Pattern) -> None:
    weight_OI, x_TI, stats = example()
    weight, norms = weight_OI.tolist(), x_TI.double().norm(dim=0).tolist()
    pruned = prune("ria", weight_OI, stats, pattern)
    # fp32 here and fp64 in the loop: no two scores of a group of this seed are as near as 1e-7.
    expected = ria_score(weight, norms)
    assert torch.equal(pruned.mask_OI, plain_mask(expected, pattern.n, pattern.m))
    assert pruned.weight_OI is None
    # The scores themselves, up to the number of tokens (100 ** 0.25); fp32 sums of 32 terms.
    unit = 100**0.25
    torch.testing.assert_close(
        pruned.score_OI.double() * unit, torch.tensor(expected).double(), rtol=1e-5, atol=0
    )
    # Another power of the norm, or a forgotten sum, gives another mask.
    for wrong in (ria_score(weight, norms, power=1.0), ria_score(weight, norms, by_row=False)):
        assert not torch.equal(pruned.mask_OI, plain_mask(wrong, pattern.n, pattern.m))
    for other in ("wanda", "magnitude"):
        assert not torch.equal(pruned.mask_OI, prune(other, weight_OI, stats, pattern).mask_OI)


def test_ria_of_rows_and_columns_of_zeros() -> None:
    weight_OI, _, stats = example()
    weight_OI[3], weight_OI[:, 5] = 0, 0
    pruned = prune("ria", weight_OI, stats, Pattern(2, 4))
    assert pruned.score_OI.isfinite().all() and is_valid(Pattern(2, 4), pruned.mask_OI)
    assert not pruned.score_OI[3].any() and not pruned.score_OI[:, 5].any()


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_ties_go_to_the_earlier_position(name: str) -> None:
    stats = InputStats(8, hessian=True)
    stats.add(torch.eye(8))
    mask_OI = prune(name, torch.ones(3, 8), stats, Pattern(2, 4)).mask_OI
    assert torch.equal(mask_OI, torch.tensor([[True, True, False, False] * 2] * 3))


def test_table_covers_the_settings() -> None:
    assert set(CRITERIA) == set(get_args(OneShotMethod))
    weight_OI, x_TI, plain_stats = example()
    stats = InputStats(32, hessian=True)
    stats.add(x_TI)
    for criterion in CRITERIA.values():
        inputs = (
            stats if criterion.needs_hessian else plain_stats if criterion.needs_stats else None
        )
        gradients = GradientStats(weight_OI.square(), 1) if criterion.needs_gradients else None
        given = Statistics(inputs, gradients)
        pruned = criterion.prune(weight_OI, given, Pattern(2, 4), PruneSection())
        assert is_valid(Pattern(2, 4), pruned.mask_OI)
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
        prune(name, torch.ones(3, 10), stats, Pattern(2, 4))


def test_magnitudes_of_pairs_are_summed_in_fp32() -> None:
    """Sums in bf16 round alike, and the earlier of two pairs would win."""
    pattern, weight_OI = Pattern.parse("4:8:pair"), example()[0].repeat(64, 1).bfloat16()
    weight_OI += (0.01 * torch.randn(weight_OI.shape)).bfloat16()
    magnitude = CRITERIA["magnitude"]
    pruned = magnitude.prune(weight_OI, Statistics(), pattern, PruneSection())
    assert torch.equal(pruned.mask_OI, pattern.best(weight_OI.float().abs()))
    assert not torch.equal(pruned.mask_OI, pattern.best(weight_OI.abs()))
