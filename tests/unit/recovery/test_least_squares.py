"""Least squares under a mask against a plain dense solver, and Hessians that are no good.

Shapes: T tokens, O out_features, I in_features.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megamask.errors import ConfigError
from megamask.recovery import least_squares
from megamask.recovery.least_squares import SOLVERS, output_error, solve
from megamask.sparsity.pattern import Pattern
from tests.parallel.plain_oneshot import DAMP
from tests.parallel.plain_oneshot import least_squares as least_squares_of

# The condition of a damped Hessian is at most I / DAMP = 2,400 here, and fp32 rounds at 6e-8.
TOLERANCE = 2_400 * 6e-8 * 10


def problem(pattern: Pattern = Pattern(2, 4)) -> tuple[torch.Tensor, ...]:  # noqa: B008
    """Weight, mask and inputs (T, I) whose features differ in size and go together."""
    made = torch.Generator().manual_seed(3)
    weight_OI = torch.randn(40, 24, generator=made)
    mix_II = torch.randn(24, 24, generator=made) / 3
    x_TI = torch.randn(200, 24, generator=made) @ mix_II * torch.randn(24, generator=made).exp()
    return weight_OI, pattern.best(weight_OI.abs()), x_TI


def hessian(x_TI: torch.Tensor) -> torch.Tensor:
    return x_TI.T @ x_TI / len(x_TI)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "6:8", "4:8:pair"])
def test_exact_is_least_squares(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(least_squares, "CHUNK_BYTES", 4 * 12**2 * 7)  # chunks of a few rows
    weight_OI, mask_OI, x_TI = problem(Pattern.parse(pattern))
    mask_OI[5] = True  # a row of a fused linear without a mask
    mask_OI[6:9] = Pattern(3, 4).best(weight_OI[6:9].abs())  # and rows with another pattern
    found_OI, used = solve(SOLVERS["exact"], weight_OI, mask_OI, hessian(x_TI), DAMP)
    expected_OI = least_squares_of(weight_OI, mask_OI, x_TI)
    expected_OI[5] = weight_OI[5].double()
    scale = expected_OI.abs().max()
    assert used == DAMP and torch.equal(found_OI[5], weight_OI[5])
    assert float((found_OI - expected_OI).abs().max() / scale) < TOLERANCE
    assert not found_OI[~mask_OI].any() and not torch.signbit(found_OI[~mask_OI]).any()
    # A Hessian of other inputs, and one without its correlations, give other weights.
    for wrong_II in (hessian(x_TI.flip(1)), hessian(x_TI).diagonal().diag()):
        wrong_OI, _ = solve(SOLVERS["exact"], weight_OI, mask_OI, wrong_II, DAMP)
        assert float((wrong_OI - expected_OI).abs().max() / scale) > 100 * TOLERANCE


def test_errors_fall_and_the_exact_error_is_the_smallest() -> None:
    weight_OI, mask_OI, x_TI = problem()
    hessian_II = hessian(x_TI)

    def error(new_OI: torch.Tensor) -> float:
        found = float(output_error(new_OI, weight_OI, hessian_II))
        by_hand = ((new_OI - weight_OI).double() @ x_TI.double().T).square().sum() / len(x_TI)
        assert found == pytest.approx(float(by_hand), rel=1e-4)  # fp32 Hessian and products
        return found

    masked = error(weight_OI * mask_OI)
    exact, sequential = (
        error(solve(one, weight_OI, mask_OI, hessian_II, DAMP)[0]) for one in SOLVERS.values()
    )
    assert exact < sequential < masked
    # The sweep equals SparseGPT's own where the mask is SparseGPT's.
    least = error(least_squares_of(weight_OI, mask_OI, x_TI, damp=1e-9).float())
    assert least < exact < 1.5 * least


def test_the_sweep_is_that_of_sparsegpt() -> None:
    from megamask.oneshot.sparsegpt import sparsegpt
    from megamask.oneshot.stats import InputStats

    weight_OI, _, x_TI = problem()
    stats = InputStats(24, hessian=True)
    stats.add(x_TI)
    pruned = sparsegpt(weight_OI, stats, Pattern(2, 4), DAMP)
    assert pruned.weight_OI is not None
    found_OI, _ = solve(SOLVERS["sequential"], weight_OI, pruned.mask_OI, stats.hessian_II, DAMP)
    # The same products in blocks of other sizes.
    assert float((found_OI - pruned.weight_OI).abs().max()) < 1e-5 * float(weight_OI.abs().max())
    assert not torch.allclose(found_OI, weight_OI * pruned.mask_OI, atol=0.1)


def test_ranks_that_divide_the_rows_use_one_damping() -> None:
    """The first row alone needs more: its two kept inputs are equal. The second rank solves the
    rows without it, and the third has no row with a removed weight.
    """
    hessian_II = torch.eye(4)
    hessian_II[0, 1] = hessian_II[1, 0] = 1
    weight_OI = torch.arange(1.0, 13.0).view(3, 4)
    mask_OI = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]]).bool()
    exact, damp = SOLVERS["exact"], 1e-9
    expected_OI, used = solve(exact, weight_OI, mask_OI, hessian_II, damp)
    assert used > damp and solve(exact, weight_OI[1:], mask_OI[1:], hessian_II, damp)[1] == damp
    votes, all_have_voted = [False] * 3, threading.Barrier(3, timeout=30)

    def of_rank(rank: int) -> tuple[torch.Tensor, float]:
        def on_any(flag: bool) -> bool:
            votes[rank] = flag
            all_have_voted.wait()
            found = any(votes)
            all_have_voted.wait()
            return found

        rows = slice(rank, rank + 1)
        return solve(exact, weight_OI[rows], mask_OI[rows], hessian_II, damp, on_any)

    with ThreadPoolExecutor(3) as ranks:
        parts = list(ranks.map(of_rank, range(3)))
    assert [damping for _, damping in parts] == [used] * 3
    assert torch.equal(torch.cat([part for part, _ in parts]), expected_OI)


@pytest.mark.parametrize("solver", SOLVERS)
def test_dead_inputs_and_damping(solver: str) -> None:
    weight_OI, mask_OI, x_TI = problem()
    x_TI[:, 7] = 0
    found_OI, used = solve(SOLVERS[solver], weight_OI, mask_OI, hessian(x_TI), DAMP)
    assert used == DAMP and torch.isfinite(found_OI).all()
    kept_O = mask_OI[:, 7]
    assert torch.allclose(found_OI[kept_O, 7], weight_OI[kept_O, 7], rtol=1e-5)
    # Rounding can leave a Hessian indefinite: more damping is used, and told.
    hessian_II = hessian(x_TI)
    hessian_II -= 0.05 * hessian_II.diagonal().mean() * torch.eye(24)
    assert solve(SOLVERS[solver], weight_OI, mask_OI, hessian_II, 0.001)[1] > 0.001
    with pytest.raises(ConfigError, match=r"recover\.damp.*positive definite"):
        solve(SOLVERS[solver], weight_OI, mask_OI, -hessian(x_TI), DAMP)
