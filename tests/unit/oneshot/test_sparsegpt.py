"""SparseGPT against a textbook sweep of Optimal Brain Surgeon in fp64.

The reference computes the inverse Hessian explicitly and updates it by Gaussian elimination; it
uses no Cholesky decomposition.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from megamask.errors import ConfigError
from megamask.oneshot.sparsegpt import inverse_factor, sparsegpt
from megamask.oneshot.stats import InputStats
from megamask.sparsity.pattern import Pattern
from tests.masks import is_valid

PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8), Pattern(4, 8, 2)]
DAMP = 0.01
# The work is fp32, the reference fp64. The rounding of fp32 (6e-8) grows at worst by the condition
# number of the damped Hessians here (600), to 4e-5. Over 6 seeds and 3 patterns the difference was
# at most 3e-7 of the largest weight, so the tolerance leaves a factor of more than ten.
WEIGHT_TOLERANCE = 5e-6
# For the same reason fp32 may decide a group in another way when its n-th and (n+1)-th score differ
# by less than this share.
NEAR_TIE = 1e-5


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@dataclass
class Reference:
    mask_OI: torch.Tensor
    weight_OI: torch.Tensor
    margin_OG: torch.Tensor


def eliminate(inverse: torch.Tensor) -> torch.Tensor:
    """The inverse Hessian of the other columns when the first column is fixed."""
    return inverse[1:, 1:] - torch.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]


def reference(
    weight_OI: torch.Tensor, hessian_II: torch.Tensor, pattern: Pattern, sign: float = 1.0
) -> Reference:
    """The sweep, column by column. ``sign=-1`` spreads errors with the wrong sign on purpose."""
    weight, hessian = weight_OI.double().clone(), hessian_II.double().clone()
    dead = hessian.diagonal() == 0
    mean = hessian.diagonal()[~dead].mean()
    hessian.diagonal()[dead] = mean
    hessian += DAMP * mean * torch.eye(len(hessian), dtype=torch.float64)
    weight[:, dead] = 0
    mask, margins = torch.zeros(weight.shape, dtype=torch.bool), []
    inverse = torch.linalg.inv(hessian)
    for column in range(weight.shape[1]):
        if column % pattern.m == 0:
            ahead, errors = inverse, []
            for first in range(column, column + pattern.m, pattern.unit):
                unit = weight[:, first : first + pattern.unit]
                inner = torch.linalg.inv(ahead[: pattern.unit, : pattern.unit])
                errors.append(((unit @ inner) * unit).sum(1))  # of both weights of a pair, removed
                for _ in range(pattern.unit):
                    ahead = eliminate(ahead)
            ranked, order = torch.stack(errors, 1).sort(dim=1, descending=True)
            keep = torch.zeros(ranked.shape, dtype=torch.bool)
            keep.scatter_(1, order[:, : pattern.units.n], True)
            mask[:, column : column + pattern.m] = keep.repeat_interleave(pattern.unit, 1)
            margins.append(1 - ranked[:, pattern.units.n] / ranked[:, pattern.units.n - 1])
        error = torch.where(mask[:, column], 0.0, weight[:, column]) / inverse[0, 0]
        weight[:, column:] -= sign * torch.outer(error, inverse[0])
        inverse = eliminate(inverse)
    return Reference(mask, weight * mask, torch.stack(margins, 1))


def example(
    out: int = 24, inp: int = 64, tokens: int = 400, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, InputStats]:
    """A weight and correlated inputs of unequal scale, where order and updates matter."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(out, inp, generator=generator)
    mixing_II = torch.randn(inp, inp, generator=generator) / inp**0.5 + torch.eye(inp)
    x_TI = (
        torch.randn(tokens, inp, generator=generator) @ mixing_II * torch.logspace(-0.5, 0.5, inp)
    )
    stats = InputStats(inp, hessian=True)
    stats.add(x_TI)
    return weight_OI, x_TI, stats


def disagreement(
    mask_OI: torch.Tensor, weight_OI: torch.Tensor, expected: Reference, m: int
) -> str | None:
    """The first disagreement as text, or None.

    A row may differ from the reference from a near-tie on; such a row is not compared further.
    """
    differs_OG = (mask_OI != expected.mask_OI).unflatten(1, (-1, m)).any(-1)
    same_O = ~differs_OG.any(1)
    for row in (~same_O).nonzero().flatten().tolist():
        first = int(differs_OG[row].int().argmax())
        if expected.margin_OG[row, first] > NEAR_TIE:
            return f"mask of row {row}, group {first}"
    if same_O.float().mean() < 0.9:
        return "more than a tenth of the rows rest on near ties"
    worst = (weight_OI.double() - expected.weight_OI)[
        same_O
    ].abs().max() / expected.weight_OI.abs().max()
    return f"weights by {worst:.1e}" if worst > WEIGHT_TOLERANCE else None


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("block", [8, 24, 128], ids=lambda block: f"block{block}")
def test_equals_optimal_brain_surgeon(pattern: Pattern, block: int) -> None:
    weight_OI, _, stats = example()
    before_OI = weight_OI.clone()
    pruned = sparsegpt(weight_OI, stats, pattern, DAMP, block)
    assert pruned.weight_OI is not None and pruned.damp == DAMP
    assert (
        disagreement(
            pruned.mask_OI,
            pruned.weight_OI,
            reference(weight_OI, stats.hessian_II, pattern),
            pattern.m,
        )
        is None
    )
    assert is_valid(pattern, pruned.mask_OI)
    assert torch.equal(weight_OI, before_OI)  # the caller's weight is untouched


def test_wrong_answers_are_seen() -> None:
    weight_OI, _, stats = example()
    pattern, hessian_II = Pattern(2, 4), stats.hessian_II
    pruned = sparsegpt(weight_OI, stats, pattern, DAMP)
    assert pruned.weight_OI is not None
    wrong = {
        "sign": reference(weight_OI, hessian_II, pattern, sign=-1.0),
        "columns transposed": reference(weight_OI, hessian_II.flip(0, 1), pattern),
        "not inverted": reference(weight_OI, torch.linalg.inv(hessian_II), pattern),
        "diagonal only": reference(weight_OI, hessian_II.diagonal().diag(), pattern),
    }
    for name, answer in wrong.items():
        assert disagreement(pruned.mask_OI, pruned.weight_OI, answer, pattern.m) is not None, name


def test_the_factor_is_of_the_inverse_and_upper() -> None:
    _, _, stats = example()
    factor_II, used = inverse_factor(stats.hessian_II, DAMP)
    hessian_II = stats.hessian_II.double()
    inverse_II = torch.linalg.inv(hessian_II + DAMP * hessian_II.diagonal().mean() * torch.eye(64))
    assert used == DAMP
    assert torch.equal(factor_II, factor_II.triu())
    # The tolerance is the rounding of fp32 times the condition number, as above.
    torch.testing.assert_close(
        factor_II.double().T @ factor_II.double(),
        inverse_II,
        rtol=1e-4,
        atol=1e-4 * inverse_II.max().item(),
    )
    transposed_II = factor_II.double() @ factor_II.double().T
    assert not torch.allclose(
        transposed_II, inverse_II, rtol=1e-2, atol=1e-2 * inverse_II.max().item()
    )


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_update_lowers_the_output_error(pattern: Pattern) -> None:
    generator = torch.Generator().manual_seed(1)
    weight_OI = torch.randn(24, 64, generator=generator)
    # The inputs have 16 common directions and some noise. So a column can replace another column,
    # as in a real model.
    x_TI = torch.randn(400, 16, generator=generator) @ torch.randn(16, 64, generator=generator) / 4
    x_TI += 0.3 * torch.randn(400, 64, generator=generator)
    stats = InputStats(64, hessian=True)
    stats.add(x_TI)
    pruned = sparsegpt(weight_OI, stats, pattern, DAMP)
    assert pruned.weight_OI is not None

    def error(sparse_OI: torch.Tensor) -> float:
        return float((x_TI @ (sparse_OI - weight_OI).T).square().mean())

    # The margins are far above rounding: with 16 directions and 16 or 32 kept inputs, the update
    # can correct most of the error.
    assert error(pruned.weight_OI) < 0.7 * error(weight_OI * pruned.mask_OI)
    assert error(pruned.weight_OI) < 0.7 * error(weight_OI * pattern.best(weight_OI.abs()))
    wrong_sign_OI = 2 * weight_OI * pruned.mask_OI - pruned.weight_OI
    assert error(wrong_sign_OI) > error(weight_OI * pruned.mask_OI)


def test_without_update_the_mask_is_the_same() -> None:
    weight_OI, _, stats = example()
    with_update = sparsegpt(weight_OI, stats, Pattern(2, 4), DAMP)
    without = sparsegpt(weight_OI, stats, Pattern(2, 4), DAMP, update=False)
    assert without.weight_OI is None
    assert torch.equal(with_update.mask_OI, without.mask_OI)


def test_rows_are_independent() -> None:
    weight_OI, _, stats = example()
    whole = sparsegpt(weight_OI, stats, Pattern(2, 4), DAMP)
    # The second part has a single row.
    parts = [
        sparsegpt(part, stats, Pattern(2, 4), DAMP) for part in (weight_OI[:23], weight_OI[23:])
    ]
    assert torch.equal(torch.cat([part.mask_OI for part in parts]), whole.mask_OI)
    joined_OI = torch.cat([part.weight_OI for part in parts if part.weight_OI is not None])
    # Matmuls of another shape may sum in another order, which changes the rounding of fp32.
    torch.testing.assert_close(joined_OI, whole.weight_OI, rtol=1e-4, atol=1e-4)


def test_scale_of_the_statistics_does_not_matter() -> None:
    weight_OI, x_TI, stats = example()
    doubled = InputStats(64, hessian=True)
    doubled.add(x_TI * 2)  # this makes the Hessian exactly 4 times as large
    expected, found = (
        sparsegpt(weight_OI, stats, Pattern(2, 4), DAMP),
        sparsegpt(weight_OI, doubled, Pattern(2, 4), DAMP),
    )
    assert expected.weight_OI is not None and found.weight_OI is not None
    assert torch.equal(expected.mask_OI, found.mask_OI)
    # A factor of two is exact in floating point, so only the order of sums may differ.
    torch.testing.assert_close(found.weight_OI, expected.weight_OI, rtol=1e-4, atol=1e-5)


def test_dead_columns_go_first() -> None:
    weight_OI, x_TI, _ = example()
    dead = [0, 1, 2, 9, 40, 41]
    x_TI[:, dead] = 0
    stats = InputStats(64, hessian=True)
    stats.add(x_TI)
    pattern = Pattern(2, 4)
    pruned = sparsegpt(weight_OI, stats, pattern, DAMP)
    assert pruned.weight_OI is not None
    expected = reference(weight_OI, stats.hessian_II, pattern)
    # Group 0 has three dead columns, so a dead column is kept. Which of them is a tie in the
    # reference, so this group is compared with the rule of ties instead.
    assert torch.equal(
        pruned.mask_OI[:, :4], torch.tensor([True, False, False, True]).expand(24, 4)
    )
    assert torch.equal(pruned.mask_OI[:, 4:], expected.mask_OI[:, 4:])
    assert not pruned.mask_OI[:, [9, 40, 41]].any()
    assert not pruned.weight_OI[:, dead].any()
    torch.testing.assert_close(
        pruned.weight_OI.double(),
        expected.weight_OI,
        rtol=0,
        atol=WEIGHT_TOLERANCE * weight_OI.abs().max().item(),
    )


def test_inputs_that_are_all_zero() -> None:
    stats = InputStats(8, hessian=True)
    stats.add(torch.zeros(5, 8))
    pruned = sparsegpt(torch.randn(3, 8), stats, Pattern(2, 4), DAMP)
    assert pruned.weight_OI is not None and not pruned.weight_OI.any()
    assert is_valid(Pattern(2, 4), pruned.mask_OI)


def test_pruned_places_are_plus_zero_in_the_dtype_of_the_weight() -> None:
    weight_OI, _, stats = example()
    pruned = sparsegpt(weight_OI.bfloat16(), stats, Pattern(2, 4), DAMP)
    assert pruned.weight_OI is not None and pruned.weight_OI.dtype == torch.bfloat16
    # The bits are compared, because -0.0 equals 0.0.
    assert not pruned.weight_OI[~pruned.mask_OI].view(torch.int16).any()
    assert pruned.weight_OI.is_contiguous() and pruned.mask_OI.is_contiguous()


def test_fewer_tokens_than_columns_raise_the_damping() -> None:
    weight_OI, _, stats = example(tokens=5)
    pruned = sparsegpt(weight_OI, stats, Pattern(2, 4), damp=1e-12)
    assert pruned.damp is not None and pruned.damp > 1e-12
    assert pruned.weight_OI is not None and pruned.weight_OI.isfinite().all()
    # The usual damping is not raised.
    assert sparsegpt(weight_OI, stats, Pattern(2, 4), DAMP).damp == DAMP


def test_refuses_what_damping_cannot_fix() -> None:
    weight_OI, _, stats = example()
    assert stats.sum_outer_II is not None
    stats.sum_outer_II -= 1e9  # the matrix is no sum of squares any more
    stats.sum_outer_II.diagonal().add_(1e9)
    with pytest.raises(
        ConfigError, match=r"prune\.damp = 0\.01.*positive definite.*calibration\.samples"
    ):
        sparsegpt(weight_OI, stats, Pattern(2, 4), DAMP)
    with pytest.raises(ConfigError, match=r"prune\.block = 6.*multiple of M, here 4"):
        sparsegpt(weight_OI, stats, Pattern(2, 4), DAMP, block=6)
