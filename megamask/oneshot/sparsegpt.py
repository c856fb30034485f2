"""SparseGPT for N:M patterns (Frantar & Alistarh, "Massive Language Models Can Be Accurately Pruned
in One-Shot", 2023, Algorithm 1).

The columns are visited from left to right. The error of a removed weight is spread over the columns
to its right, so that the output of the layer on the calibration inputs changes least. Each group of
m columns chooses its weights to remove from the weights that earlier groups have updated. The
paper removes single weights; the error of a pair, which is removed together, is the error of both
in the paper's order of columns (``_errors``).

The error is spread in three steps to save memory traffic: at once over the rest of the group, after
each group over the rest of the block, and after each block over the rest of the row. The weights
are stored transposed, so that a column is contiguous.

Shapes: O out_features, I in_features, B columns of a block, M columns of a group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megamask.config.tree import PruneSection
from megamask.errors import ConfigError
from megamask.oneshot.criterion import Criterion, Pruned
from megamask.oneshot.stats import InputStats, Statistics
from megamask.sparsity.pattern import Pattern

DAMP_STEP = 10.0  # factor by which the damping is raised
DAMP_LIMIT = 1.0  # the mean diagonal; a Hessian that needs more is not a sum of squares


class SparseGPT(Criterion):
    """The mask of SparseGPT and, with ``update``, the weight that makes up for the removed weights.

    The mask is the same with and without ``update``.
    """

    algorithm = "sparsegpt"
    reads = ("damp", "block")
    needs_stats = True
    needs_hessian = True

    def __init__(self, update: bool) -> None:
        self.updates_weight = update

    def check(self, pattern: Pattern, settings: PruneSection) -> None:
        """Refuse a block that would cut a group.

        Raises:
            ConfigError: ``prune.block`` is not a multiple of m.
        """
        check_block(settings.block, pattern)

    def prune(
        self,
        weight_OI: torch.Tensor,
        stats: Statistics,
        pattern: Pattern,
        settings: PruneSection,
    ) -> Pruned:
        """Choose the mask with ``prune.damp`` and ``prune.block``; raises as ``sparsegpt``."""
        damp, block, update = settings.damp, settings.block, self.updates_weight
        return sparsegpt(weight_OI, stats.of_inputs, pattern, damp, block, update)


@torch.no_grad()
def sparsegpt(
    weight_OI: torch.Tensor,
    stats: InputStats,
    pattern: Pattern,
    damp: float = 0.01,
    block: int = 128,
    update: bool = True,
) -> Pruned:
    """Prune a weight: the mask (O, I) and, with ``update``, the updated weight.

    Rows do not interact, so a weight that is split over its rows gives the same result. Columns
    whose input was always zero are removed first and are zero in the updated weight.

    Args:
        weight_OI: any float dtype; the work is done in fp32.
        stats: statistics of the whole input, with the Hessian.
        pattern: the N:M pattern.
        damp: share of the mean diagonal that is added to the Hessian's diagonal; raised in steps
            when the Hessian needs more.
        block: number of columns per update of the row, a multiple of m. It changes the speed, and
            the result only up to rounding.
        update: False keeps the original weight (``weight_OI`` of the result is None).

    Raises:
        ConfigError: m does not divide in_features or the block, there are no tokens, the inputs are
            not finite, or damping cannot make the Hessian positive definite.
    """
    in_features = weight_OI.shape[1]
    pattern.groups(in_features)
    check_block(block, pattern)
    hessian_II = stats.hessian_II
    dead_I = hessian_II.diagonal() == 0
    factor_II, used_damp = inverse_factor(hessian_II, damp)

    # Sweep over the blocks of columns.
    work_IO = weight_OI.t().clone(memory_format=torch.contiguous_format).float()
    work_IO[dead_I] = 0
    keep_IO, score_IO = torch.empty_like(work_IO, dtype=torch.bool), torch.empty_like(work_IO)
    for start in range(0, in_features, block):
        here, rest = slice(start, start + block), slice(start + block, None)
        errors_BO = _prune_block(
            work_IO[here], keep_IO[here], score_IO[here], factor_II[here, here], pattern
        )
        work_IO[rest].addmm_(factor_II[here, rest].t(), errors_BO, alpha=-1)

    mask_OI, score_OI = keep_IO.t().contiguous(), score_IO.t()
    if not update:
        return Pruned(mask_OI, score_OI, damp=used_damp)
    # Pruned places are filled, because W * 0 could be -0.0.
    updated_OI = work_IO.masked_fill_(~keep_IO, 0.0).t().to(weight_OI.dtype).contiguous()
    return Pruned(mask_OI, score_OI, updated_OI, used_damp)


def check_block(block: int, pattern: Pattern) -> None:
    """Refuse a block that would cut a group.

    Raises:
        ConfigError: ``prune.block`` is not a multiple of m.
    """
    if block < 1 or block % pattern.m:
        fix = f"Write prune.block={max(block // pattern.m, 1) * pattern.m}."
        raise ConfigError("prune.block", block, f"a multiple of M, here {pattern.m}", fix)


def inverse_factor(
    hessian_II: torch.Tensor,
    damp: float,
    key: str = "prune.damp",
    on_any: Callable[[bool], bool] = bool,
) -> tuple[torch.Tensor, float]:
    """Upper triangular U with U^T U = inverse of the damped Hessian, (I, I), and the damping used.

    Row j of U is row j of the inverse Hessian of the columns j, j + 1, ..., divided by the root of
    its first entry; the sweep needs nothing else. U is computed without the inverse: Cholesky in
    reversed order gives H = R R^T with R upper triangular, and U = R^-1.

    Columns with a zero diagonal (their input was always zero) get the mean of the other diagonal
    entries; such a column does not interact with the others. ``on_any`` is as for ``damped``.

    Raises:
        ConfigError: of ``key``; the Hessian is not positive definite with ``damp``, nor when the
            damping is raised by DAMP_STEP again and again up to DAMP_LIMIT.
    """
    return damped(hessian_II, damp, _factor_or_none, key, on_any)


def damped(
    hessian_II: torch.Tensor,
    damp: float,
    attempt: Callable[[torch.Tensor], torch.Tensor | None],
    key: str = "prune.damp",
    on_any: Callable[[bool], bool] = bool,
) -> tuple[torch.Tensor, float]:
    """The result of ``attempt`` on the damped Hessian, and the damping used. A zero on the diagonal
    counts as the mean of the other diagonal entries.

    Args:
        hessian_II: the Hessian, which does not change.
        damp: share of the mean diagonal that is added to the diagonal.
        attempt: gives None where the damped Hessian is not positive definite.
        key: the setting that chose ``damp``, for the message.
        on_any: whether a flag is set on any rank that works on the same linear: where an attempt
            fails on one, all raise the damping.

    Raises:
        ConfigError: the attempt fails up to DAMP_LIMIT.
    """
    diagonal_I = hessian_II.diagonal()
    live_I = diagonal_I[diagonal_I > 0]
    mean = live_I.mean() if len(live_I) else diagonal_I.new_ones(())
    filled_I = torch.where(diagonal_I == 0, mean, diagonal_I)
    used = damp
    while True:
        damped_II = hessian_II.clone()
        damped_II.diagonal().copy_(filled_I + used * mean)
        found = attempt(damped_II)
        if not on_any(found is None):
            assert found is not None
            return found, used
        if used >= DAMP_LIMIT:
            allowed = (
                "the damped Hessian must be positive definite, "
                f"and is not with damping up to {used:g}"
            )
            fix = f"Raise calibration.samples, or raise {key}."
            raise ConfigError(key, damp, allowed, fix)
        used = min(used * DAMP_STEP, DAMP_LIMIT)


def _factor_or_none(damped_II: torch.Tensor) -> torch.Tensor | None:
    """The factor U of a damped Hessian; None if it is not positive definite."""
    reversed_II, failed = torch.linalg.cholesky_ex(damped_II.flip(0, 1))
    if failed:
        return None
    eye_II = torch.eye(len(damped_II), dtype=damped_II.dtype, device=damped_II.device)
    factor_II: torch.Tensor = torch.linalg.solve_triangular(
        reversed_II.flip(0, 1), eye_II, upper=True
    )
    return factor_II


def _prune_block(
    work_BO: torch.Tensor,
    keep_BO: torch.Tensor,
    score_BO: torch.Tensor,
    factor_BB: torch.Tensor,
    pattern: Pattern,
) -> torch.Tensor:
    """Choose and remove weights in every group of a block, in place.

    Returns:
        The errors (B, O), which the caller spreads over the later blocks.
    """
    errors_BO = torch.empty_like(work_BO)
    for start in range(0, len(work_BO), pattern.m):
        here, rest = slice(start, start + pattern.m), slice(start + pattern.m, None)
        factor_MM = factor_BB[here, here]
        score_MO = score_BO[here]
        _score(work_BO[here], factor_MM, pattern.unit, score_MO)
        keep_BO[here] = pattern.best(score_MO.t().contiguous()).t()
        remove_columns(work_BO[here], keep_BO[here], factor_MM, errors_BO[here])
        work_BO[rest].addmm_(factor_BB[here, rest].t(), errors_BO[here], alpha=-1)
    return errors_BO


def _score(
    work_MO: torch.Tensor, factor_MM: torch.Tensor, unit: int, score_MO: torch.Tensor
) -> None:
    """Write the score of every weight of a group to ``score_MO``.

    The score of a weight is the root of the paper's w^2 / [H^-1]_cc: the same order without
    underflow. The error of a unit q, removed together with the columns to its right making up for
    it, is w_q^T ([H^-1]_qq)^-1 w_q (Kurtic et al., "The Optimal BERT Surgeon", arXiv 2203.07259,
    2022), where H has the columns from q on. With [H^-1]_qq = U_qq^T U_qq it is |U_qq^-T w_q|^2:
    the sum of the squared errors of its weights, removed one after the other. Each weight of the
    unit gets an equal part of the root.
    """
    if unit == 1:
        torch.div(work_MO, factor_MM.diagonal()[:, None], out=score_MO).abs_()
        return
    for start in range(0, len(work_MO), unit):
        here = slice(start, start + unit)
        errors = torch.linalg.solve_triangular(
            factor_MM[here, here].t(), work_MO[here], upper=False
        )
        score_MO[here] = torch.linalg.vector_norm(errors, dim=0) / unit


def remove_columns(
    work_MO: torch.Tensor, keep_MO: torch.Tensor, factor_MM: torch.Tensor, errors_MO: torch.Tensor
) -> None:
    """Remove the weights of a group column by column, in place.

    Each error is written to ``errors_MO`` and spread over the later columns of the group.
    """
    for column in range(len(work_MO)):
        torch.div(work_MO[column], factor_MM[column, column], out=errors_MO[column])
        errors_MO[column].masked_fill_(keep_MO[column], 0.0)
        work_MO[column + 1 :].addr_(factor_MM[column, column + 1 :], errors_MO[column], alpha=-1)
