"""Least squares under a given mask: the kept weights whose outputs on the calibration inputs are
nearest to the outputs of the dense weights.

For a row w with the kept columns S the answer v minimises (v - w)^T (H + d I) (v - w) among the
rows that are zero outside S, where H is the mean of x x^T over the calibration tokens and d the
damping. Its normal equations are (H + d I)_SS v_S = ((H + d I) w)_S. The error (v - w)^T H (v - w)
without damping falls too: v_S = w_S has no distance from w on S, so v pays for its own distance
with a smaller error. A column whose input was always zero keeps its weight.

``exact`` solves the equations of every row by a Cholesky factorisation: each row has its own S, so
the cost of a row is |S|^3 / 3 multiplications. ``sequential`` is the sweep of SparseGPT (Frantar &
Alistarh, 2023, Algorithm 1) with the mask given: columns from left to right, the error of a removed
weight spread over the columns to its right. One factorisation serves all rows, and columns that
were passed stay as they are, so the error is larger.

Shapes: O out_features, I in_features, R rows of a chunk, K kept columns of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from megamask.oneshot.sparsegpt import damped, inverse_factor, remove_columns

DAMP = "recover.damp"
CHUNK_BYTES = 2**28  # of the matrices that are factored together
BLOCK = 128  # columns of a lazy update of the sequential sweep

OnAny = Callable[[bool], bool]  # whether a flag is set on any rank
# (weight_OI, mask_OI, hessian_II, damp, on_any) -> (weights, damping used)
Solver = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, float, OnAny], tuple[torch.Tensor, float]
]


def solve(
    solver: Solver,
    weight_OI: torch.Tensor,
    mask_OI: torch.Tensor,
    hessian_II: torch.Tensor,
    damp: float,
    on_any: OnAny = bool,
) -> tuple[torch.Tensor, float]:
    """The weights (O, I), fp32, +0.0 outside the mask, and the damping that was used. A row without
    a removed weight stays as it is.

    The ranks that divide the rows of a linear among them use one damping for all of its rows, so
    that its weights do not depend on the layout. All of them must call this function.

    Args:
        solver: an entry of ``SOLVERS``.
        weight_OI: dense weights, any float dtype; the work is done in fp32.
        mask_OI: bool, True = keep; rows may keep different numbers of weights.
        hessian_II: mean of x x^T over the tokens, fp32.
        damp: share of the mean diagonal that is added to the diagonal; raised tenfold, up to the
            mean diagonal, while a factorisation fails on any rank.
        on_any: whether a flag is set on any of the ranks.

    Raises:
        ConfigError: no damping makes the Hessian positive definite.
    """
    found_OI = weight_OI.detach().float().clone()
    rows = (~mask_OI).any(dim=1).nonzero().flatten()
    if not on_any(len(rows) > 0):
        return found_OI, damp
    kept_OI = mask_OI[rows]
    solved_OI, used = solver(found_OI[rows], kept_OI, hessian_II, damp, on_any)
    found_OI[rows] = solved_OI.masked_fill(~kept_OI, 0.0)
    return found_OI, used


def exact(
    weight_OI: torch.Tensor,
    mask_OI: torch.Tensor,
    hessian_II: torch.Tensor,
    damp: float,
    on_any: OnAny = bool,
) -> tuple[torch.Tensor, float]:
    """The least squares of every row; arguments, result and errors as ``solve``."""
    attempt = partial(_exact_or_none, weight_OI, mask_OI)
    return damped(hessian_II, damp, attempt, DAMP, on_any)


def _exact_or_none(
    weight_OI: torch.Tensor, mask_OI: torch.Tensor, damped_II: torch.Tensor
) -> torch.Tensor | None:
    """The least squares of every row; None where a matrix is not positive definite."""
    target_OI = weight_OI @ damped_II
    found_OI = torch.zeros_like(weight_OI)
    for rows, kept in _chunks(mask_OI.sum(dim=1)):
        columns_RK = mask_OI[rows].nonzero()[:, 1].view(-1, kept)
        matrix_RKK = damped_II[columns_RK[:, :, None], columns_RK[:, None, :]]
        factor_RKK, failed_R = torch.linalg.cholesky_ex(matrix_RKK)
        if bool(failed_R.any()):
            return None
        target_RK = target_OI[rows].gather(1, columns_RK)
        solved_RK = torch.cholesky_solve(target_RK[:, :, None], factor_RKK)[:, :, 0]
        found_OI[rows] = found_OI[rows].scatter_(1, columns_RK, solved_RK)
    return found_OI


def _chunks(kept_O: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
    """Numbers of rows that keep equally many columns, and this number of columns. The matrices of
    the rows together take ``CHUNK_BYTES``, or it is a single row.
    """
    for kept in kept_O.unique().tolist():
        step = max(1, CHUNK_BYTES // (4 * max(kept, 1) ** 2))
        yield from ((rows, kept) for rows in (kept_O == kept).nonzero().flatten().split(step))


def sequential(
    weight_OI: torch.Tensor,
    mask_OI: torch.Tensor,
    hessian_II: torch.Tensor,
    damp: float,
    on_any: OnAny = bool,
) -> tuple[torch.Tensor, float]:
    """The sweep of SparseGPT under the mask; arguments, result and errors as ``solve``."""
    factor_II, used = inverse_factor(hessian_II, damp, DAMP, on_any)
    work_IO = weight_OI.t().contiguous().clone()
    keep_IO = mask_OI.t().contiguous()
    for start in range(0, len(work_IO), BLOCK):
        here, rest = slice(start, start + BLOCK), slice(start + BLOCK, None)
        errors_BO = torch.empty_like(work_IO[here])
        remove_columns(work_IO[here], keep_IO[here], factor_II[here, here], errors_BO)
        work_IO[rest].addmm_(factor_II[here, rest].t(), errors_BO, alpha=-1)
    return work_IO.t(), used


SOLVERS: dict[str, Solver] = {"exact": exact, "sequential": sequential}


def output_error(
    weight_OI: torch.Tensor, dense_OI: torch.Tensor, hessian_II: torch.Tensor
) -> torch.Tensor:
    """The mean squared distance of a token's outputs from those of the dense weights, summed over
    the rows, 0-d fp64.
    """
    apart_OI = weight_OI.float() - dense_OI.float()
    return ((apart_OI @ hessian_II) * apart_OI).sum(dtype=torch.float64)
