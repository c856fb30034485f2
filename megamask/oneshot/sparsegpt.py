"""SparseGPT, N:M (Frantar & Alistarh, "Massive Language Models Can Be Accurately Pruned in
One-Shot", 2023, Algorithm 1).

Columns are visited from left to right. A removed weight's error is spread over the columns to its
right so that the layer's output on the calibration inputs changes least; each group of m columns
chooses what to remove from weights updated so far.

The sweep is lazy on two levels: errors reach the rest of the group at once, the rest of the block
after each group, the rest of the row after each block. Weights are held transposed, so that a
column is contiguous.

Shapes: O out_features, I in_features, B columns of a block, M columns of a group.
"""

from __future__ import annotations

import torch

from megamask.errors import ConfigError
from megamask.oneshot.pruned import Pruned
from megamask.oneshot.stats import InputStats
from megamask.sparsity.pattern import Pattern

DAMP_STEP = 10.0
DAMP_LIMIT = 1.0  # as much again as the mean diagonal: what this cannot fix is not a sum of squares


@torch.no_grad()
def sparsegpt(
    weight_OI: torch.Tensor,
    stats: InputStats,
    pattern: Pattern,
    damp: float = 0.01,
    block: int = 128,
    update: bool = True,
) -> Pruned:
    """Mask (O, I) and, with ``update``, the weight that makes up for what was removed.

    Rows do not interact, so a weight split over its rows gives the same result. Columns whose input
    was always zero are removed first and are zero in the updated weight. The mask is the same with
    and without ``update``.

    Args:
        weight_OI: any float dtype; the work is done in fp32.
        stats: of the whole input, with the Hessian.
        damp: share of the mean diagonal added to the Hessian's diagonal; raised in steps if the
            Hessian needs more.
        block: columns per lazy update, a multiple of m. Changes speed, not the result (up to
            rounding).
        update: False keeps the original weight (``weight_OI`` of the result is None).

    Raises:
        ConfigError: m does not divide in_features or the block; no tokens, inputs that are not
            finite, a Hessian that damping cannot make positive definite.
    """
    in_features = weight_OI.shape[1]
    pattern.groups(in_features)
    check_block(block, pattern)
    hessian_II = stats.hessian_II
    dead_I = hessian_II.diagonal() == 0
    factor_II, used_damp = inverse_factor(hessian_II, damp)

    work_IO = weight_OI.t().clone(memory_format=torch.contiguous_format).float()
    work_IO[dead_I] = 0
    keep_IO = torch.empty_like(work_IO, dtype=torch.bool)
    for start in range(0, in_features, block):
        here, rest = slice(start, start + block), slice(start + block, None)
        errors_BO = _prune_block(work_IO[here], keep_IO[here], factor_II[here, here], pattern)
        work_IO[rest].addmm_(factor_II[here, rest].t(), errors_BO, alpha=-1)

    mask_OI = keep_IO.t().contiguous()
    if not update:
        return Pruned(mask_OI, damp=used_damp)
    updated_OI = (
        work_IO.masked_fill_(~keep_IO, 0.0).t().to(weight_OI.dtype).contiguous()
    )  # a fill: W * 0 could be -0.0
    return Pruned(mask_OI, updated_OI, used_damp)


def check_block(block: int, pattern: Pattern) -> None:
    """Refuse a block that would cut a group.

    Raises:
        ConfigError: ``prune.block`` is not a multiple of m.
    """
    if block < 1 or block % pattern.m:
        fix = f"Write prune.block={max(block // pattern.m, 1) * pattern.m}."
        raise ConfigError("prune.block", block, f"a multiple of M, here {pattern.m}", fix)


def inverse_factor(hessian_II: torch.Tensor, damp: float) -> tuple[torch.Tensor, float]:
    """Upper triangular U with U^T U = inverse of the damped Hessian, (I, I), and the damping used.

    Row j of U is row j of the inverse Hessian of columns j, j+1, ... divided by the root of its
    first entry: all the sweep needs.
    U is got without the inverse: Cholesky in reversed order gives H = R R^T with R upper
    triangular, and U = R^-1.

    Columns with a zero diagonal (no input) get the mean of the other diagonal entries; they touch
    no other column.

    Raises:
        ConfigError: not positive definite, with ``damp`` or with DAMP_STEP times more, and more, up
            to DAMP_LIMIT.
    """
    diagonal_I = hessian_II.diagonal()
    live_I = diagonal_I[diagonal_I > 0]
    mean = live_I.mean() if len(live_I) else diagonal_I.new_ones(())
    filled_I = torch.where(diagonal_I == 0, mean, diagonal_I)
    used = damp
    while (factor_II := _factor_or_none(hessian_II, filled_I + used * mean)) is None:
        if used >= DAMP_LIMIT:
            allowed = f"the damped Hessian must be positive definite, and is not with damping up to {used:g}"
            raise ConfigError(
                "prune.damp", damp, allowed, "Raise calibration.samples, or raise prune.damp."
            )
        used = min(used * DAMP_STEP, DAMP_LIMIT)
    return factor_II, used


def _factor_or_none(hessian_II: torch.Tensor, diagonal_I: torch.Tensor) -> torch.Tensor | None:
    """The factor of ``inverse_factor`` for the Hessian with this diagonal, or None if that is not
    positive definite.
    """
    damped_II = hessian_II.clone()
    damped_II.diagonal().copy_(diagonal_I)
    reversed_II, failed = torch.linalg.cholesky_ex(damped_II.flip(0, 1))
    if failed:
        return None
    eye_II = torch.eye(len(diagonal_I), dtype=hessian_II.dtype, device=hessian_II.device)
    return torch.linalg.solve_triangular(reversed_II.flip(0, 1), eye_II, upper=True)


def _prune_block(
    work_BO: torch.Tensor, keep_BO: torch.Tensor, factor_BB: torch.Tensor, pattern: Pattern
) -> torch.Tensor:
    """Choose and remove in every group of a block, in place; returns the errors (B, O) to spread
    over the later blocks.
    """
    errors_BO = torch.empty_like(work_BO)
    for start in range(0, len(work_BO), pattern.m):
        here, rest = slice(start, start + pattern.m), slice(start + pattern.m, None)
        factor_MM = factor_BB[here, here]
        # the paper's w^2 / [H^-1]_cc, of which this is the root: same order, no underflow
        score_MO = (work_BO[here] / factor_MM.diagonal()[:, None]).abs_()
        keep_BO[here] = pattern.best(score_MO.t().contiguous()).t()
        _remove_columns(work_BO[here], keep_BO[here], factor_MM, errors_BO[here])
        work_BO[rest].addmm_(factor_BB[here, rest].t(), errors_BO[here], alpha=-1)
    return errors_BO


def _remove_columns(
    work_MO: torch.Tensor, keep_MO: torch.Tensor, factor_MM: torch.Tensor, errors_MO: torch.Tensor
) -> None:
    """Remove a group's weights column by column: each error goes into ``errors_MO`` and over the
    group's later columns, in place.
    """
    for column in range(len(work_MO)):
        torch.div(work_MO[column], factor_MM[column, column], out=errors_MO[column])
        errors_MO[column].masked_fill_(keep_MO[column], 0.0)
        work_MO[column + 1 :].addr_(factor_MM[column, column + 1 :], errors_MO[column], alpha=-1)
