"""GBLM and Pruner-Zero against plain loops from the papers' code."""

from __future__ import annotations

import pytest
import torch

from megamask.config.tree import PruneSection
from megamask.errors import ConfigError
from megamask.oneshot.criteria import CRITERIA
from megamask.oneshot.stats import GradientStats, InputStats, Statistics
from megamask.sparsity.pattern import Pattern
from tests.unit.oneshot.test_simple_criteria import PATTERNS, example, plain_mask

SAMPLES, TOKENS = 5, 20  # the 100 tokens of the example


def gradients(scale: float = 0.02) -> tuple[torch.Tensor, GradientStats]:
    noise = torch.Generator().manual_seed(4)
    sizes_OI = torch.randn(12, 32, generator=noise).exp()
    gradient_NOI = scale * sizes_OI * torch.randn(SAMPLES, 12, 32, generator=noise)
    return gradient_NOI, GradientStats(gradient_NOI.square().sum(0), SAMPLES)


def norms(gradient_NOI: torch.Tensor) -> list[list[float]]:
    return [
        [sum(g**2 for g in column) ** 0.5 for column in zip(*row, strict=True)]
        for row in gradient_NOI.transpose(0, 1).tolist()
    ]


def gblm_score(
    weight_OI: torch.Tensor, x_TI: torch.Tensor, gradient_NOI: torch.Tensor, alpha: float
) -> list[list[float]]:
    """The sum of both terms. The code of the paper averages the squared norms of the samples."""
    samples = x_TI.double().split(TOKENS)
    inputs = [
        (sum(float(one[:, i].square().sum()) for one in samples) / SAMPLES) ** 0.5
        for i in range(x_TI.shape[1])
    ]
    return [
        [abs(w) * inputs[i] + alpha * abs(w) * g[i] for i, w in enumerate(row)]
        for row, g in zip(weight_OI.tolist(), norms(gradient_NOI), strict=True)
    ]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_gblm(pattern: Pattern) -> None:
    weight_OI, x_TI, inputs = example()
    gradient_NOI, stats = gradients()
    given, settings = Statistics(inputs, stats), PruneSection(alpha=50)
    pruned = CRITERIA["gblm"].prune(weight_OI, given, pattern, settings)
    expected = gblm_score(weight_OI, x_TI, gradient_NOI, 50)
    # fp32 here and fp64 there: no two scores of a group of this seed are as near as 1e-7.
    assert torch.equal(pruned.mask_OI, plain_mask(expected, pattern.n, pattern.m))
    torch.testing.assert_close(
        pruned.score_OI.double(), torch.tensor(expected).double(), rtol=1e-5, atol=0
    )
    wrong = {
        "no gradients": gblm_score(weight_OI, x_TI, 0 * gradient_NOI, 50),
        "another alpha": gblm_score(weight_OI, x_TI, gradient_NOI, 100),
        "inputs in tokens": gblm_score(weight_OI, x_TI / TOKENS**0.5, gradient_NOI, 50),
        "gradients added": gblm_score(weight_OI, x_TI, gradient_NOI.sum(0, keepdim=True), 50),
    }
    for name, score in wrong.items():
        assert not torch.equal(pruned.mask_OI, plain_mask(score, pattern.n, pattern.m)), name


def pruner_zero_score(
    weight_OI: torch.Tensor, gradient_NOI: torch.Tensor, shift: bool = True
) -> list[list[float]]:
    """``shift`` False forgets to take the least gradient off."""
    norm = norms(gradient_NOI)
    least, most = min(map(min, norm)), max(map(max, norm))
    return [
        [abs(w * w) * (g - shift * least) / (most - least) for w, g in zip(row, gs, strict=True)]
        for row, gs in zip(weight_OI.tolist(), norm, strict=True)
    ]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_pruner_zero(pattern: Pattern) -> None:
    weight_OI, _, _ = example()
    gradient_NOI, stats = gradients()
    criterion, settings = CRITERIA["pruner_zero"], PruneSection()
    pruned = criterion.prune(weight_OI, Statistics(gradients=stats), pattern, settings)
    expected = pruner_zero_score(weight_OI, gradient_NOI)
    # fp32 here and fp64 there: no two scores of a group of this seed are as near as 1e-7.
    assert torch.equal(pruned.mask_OI, plain_mask(expected, pattern.n, pattern.m))
    # The least gradient is subtracted, which costs digits where a gradient is near to it.
    torch.testing.assert_close(
        pruned.score_OI.double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-7
    )
    for wrong in (
        pruner_zero_score(weight_OI.abs().sqrt(), gradient_NOI),  # |W|, not W^2
        pruner_zero_score(weight_OI, gradient_NOI.square()),
        pruner_zero_score(weight_OI, gradient_NOI + 1, shift=False),
    ):
        assert not torch.equal(pruned.mask_OI, plain_mask(wrong, pattern.n, pattern.m))


def test_min_and_max_are_of_the_whole_linear() -> None:
    """The shift changes which weights are kept, so a shard of rows would choose otherwise."""
    weight_OI, _, _ = example()
    gradient_NOI, _ = gradients()
    gradient_NOI[:, 6:] += 0.05  # these rows have another minimum
    stats = GradientStats(gradient_NOI.square().sum(0), SAMPLES)
    whole = CRITERIA["pruner_zero"].prune(
        weight_OI, Statistics(gradients=stats), Pattern(2, 4), PruneSection()
    )
    halves = [
        pruner_zero_score(weight, gradient)
        for weight, gradient in zip(weight_OI.split(6), gradient_NOI.split(6, dim=1), strict=True)
    ]
    sharded = torch.cat([plain_mask(half, 2, 4) for half in halves])
    assert CRITERIA["pruner_zero"].mixes_rows
    assert not torch.equal(whole.mask_OI, sharded)
    assert torch.equal(whole.mask_OI, plain_mask(pruner_zero_score(weight_OI, gradient_NOI), 2, 4))


@pytest.mark.parametrize("name", ["gblm", "pruner_zero"])
def test_refuses_gradients_that_are_not_finite(name: str) -> None:
    weight_OI, _, inputs = example()
    _, stats = gradients()
    stats.sum_square_OI[1, 2] = torch.inf
    with pytest.raises(ConfigError, match=r"1 of 384 gradients.*must be finite"):
        CRITERIA[name].prune(weight_OI, Statistics(inputs, stats), Pattern(2, 4), PruneSection())


def test_statistics_that_were_not_collected() -> None:
    with pytest.raises(ValueError, match="no statistics of the inputs"):
        _ = Statistics().of_inputs
    with pytest.raises(ValueError, match="no gradients"):
        _ = Statistics(InputStats(4, hessian=False)).of_gradients
