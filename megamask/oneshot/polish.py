"""A polish of any mask on the Gram matrix: within each group, a removed weight and a kept weight
change places while the error of the linear's outputs falls.

The error of a row is r^T H r, where r holds the removed weights and H is the mean of x x^T over the
calibration tokens. SparseSwaps (Zimmer et al., "SparseSwaps: Tractable LLM Pruning Mask Refinement
at Scale", 2025) takes the best exchange of a whole row at a time; here each group in turn, from
left to right, makes its best exchange, which costs as much as one product with H for each sweep.
The weights stay as they are. Rows do not interact.

The scores of a polished mask are by the same error (``scores``). Those of the criterion, against
which the exchanges went, make margins from which learning goes back to the mask of before.

Shapes: O out_features, R rows of a piece, I in_features, U units of a row, B columns of a block,
M columns of a group.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megamask.config.tree import PruneSection
from megamask.oneshot.criterion import Criterion, Pruned
from megamask.oneshot.stats import Statistics
from megamask.sparsity.pattern import Pattern

BLOCK = 128  # columns whose exchanges are carried to the rest of the row together
ROWS = 1024  # rows whose scores are computed together; they do not interact
# An exchange must gain this share of the terms that its gain is a sum of: fp32 knows the terms to
# about 1e-6, and an exchange that rounding made a gain could raise the error.
LEAST_GAIN = 1e-5


class Polished(Criterion):
    """The mask of a criterion after ``prune.polish`` sweeps, with scores of its own.

    Args:
        inner: the criterion, which leaves the weights as they are.
    """

    needs_stats = True
    needs_hessian = True

    def __init__(self, inner: Criterion) -> None:
        assert not inner.updates_weight
        self.inner = inner
        self.reads = (*inner.reads, "polish")
        self.facts = {**inner.facts, "margins": "of exchanges"}  # they were the criterion's
        self.needs_gradients = inner.needs_gradients
        self.mixes_rows = inner.mixes_rows

    def check(self, pattern: Pattern, settings: PruneSection) -> None:
        """As the criterion."""
        self.inner.check(pattern, settings)

    def prune(
        self, weight_OI: torch.Tensor, stats: Statistics, pattern: Pattern, settings: PruneSection
    ) -> Pruned:
        """Choose the mask and polish it; raises as the criterion."""
        pruned = self.inner.prune(weight_OI, stats, pattern, settings)
        gram_II = stats.of_inputs.hessian_II
        mask_OI = polish(weight_OI, pruned.mask_OI, gram_II, pattern, settings.polish)
        score_OI = scores(weight_OI, mask_OI, gram_II, pattern)
        return replace(pruned, mask_OI=mask_OI, score_OI=score_OI)


@torch.no_grad()
def polish(
    weight_OI: torch.Tensor,
    mask_OI: torch.Tensor,
    gram_II: torch.Tensor,
    pattern: Pattern,
    sweeps: int,
) -> torch.Tensor:
    """A mask (O, I) with at most the error of ``mask_OI``, which stays as it is.

    Args:
        weight_OI: any float dtype; the work is done in fp32.
        mask_OI: bool, n of every m.
        gram_II: H of the whole input, fp32.
        pattern: the N:M pattern.
        sweeps: how often every group may make an exchange; the work ends when none makes any.
    """
    weight_OI, mask_OI = weight_OI.detach().float(), mask_OI.clone()
    block = max(BLOCK // pattern.m, 1) * pattern.m
    for _ in range(sweeps):
        # Half the slope of the error: H r, of the rows as they are now.
        slope_OI = torch.where(mask_OI, 0, weight_OI) @ gram_II
        before_OI = mask_OI.clone()
        for start in range(0, weight_OI.shape[1], block):
            here, rest = slice(start, start + block), slice(start + block, None)
            change_OB = _exchange_in_block(
                weight_OI[:, here],
                mask_OI[:, here],
                slope_OI[:, here],
                gram_II[here, here],
                pattern,
            )
            slope_OI[:, rest].addmm_(change_OB, gram_II[here, rest])
        if torch.equal(mask_OI, before_OI):
            break
    return mask_OI


@torch.no_grad()
def scores(
    weight_OI: torch.Tensor, mask_OI: torch.Tensor, gram_II: torch.Tensor, pattern: Pattern
) -> torch.Tensor:
    """The scores (O, I), fp32, of a mask by the error r^T H r of its rows: of a kept weight the
    error that its removal would add, 2 w (H r) + w^2 H_ii, and of a removed weight the error that
    its return would take away, 2 w (H r) - w^2 H_ii. The weights of a unit go and return together,
    so that the sum of their scores is the unit's.

    An exchange changes the error by the difference of two scores, less the term 2 w_i w_j H_ij of
    both. So where no exchange gains, the kept units of a group have the larger scores but for that
    term.

    Args:
        weight_OI: any float dtype.
        mask_OI: bool, n of every m.
        gram_II: H of the whole input, fp32.
        pattern: the N:M pattern.
    """
    unit, score_OI = pattern.unit, torch.empty_like(weight_OI, dtype=torch.float32)
    # The terms of a weight with itself and the others of its unit.
    gram_UuUu = gram_II.unflatten(1, (-1, unit)).unflatten(0, (-1, unit))
    gram_uuU = gram_UuUu.diagonal(dim1=0, dim2=2)
    for start in range(0, len(score_OI), ROWS):
        some = slice(start, start + ROWS)
        weight_RI, mask_RI = weight_OI[some].detach().float(), mask_OI[some]
        slope_RI = torch.where(mask_RI, 0, weight_RI) @ gram_II
        weight_RUu = weight_RI.unflatten(1, (-1, unit))
        own_RI = torch.einsum("rua,abu->rub", weight_RUu, gram_uuU).flatten(1).mul_(weight_RI)
        own_RI = torch.where(mask_RI, own_RI, -own_RI)
        score_OI[some] = own_RI.addcmul_(weight_RI, slope_RI, value=2)
    return score_OI


def _exchange_in_block(
    weight_OB: torch.Tensor,
    mask_OB: torch.Tensor,
    slope_OB: torch.Tensor,
    gram_BB: torch.Tensor,
    pattern: Pattern,
) -> torch.Tensor:
    """Make the best exchange of every group of a block, in place.

    Returns:
        The change of the removed weights r, (O, B), which the caller carries to later blocks.
    """
    change_OB = torch.zeros_like(weight_OB)
    for start in range(0, weight_OB.shape[1], pattern.m):
        here, rest = slice(start, start + pattern.m), slice(start + pattern.m, None)
        change_OM = change_OB[:, here]
        _exchange(
            weight_OB[:, here],
            mask_OB[:, here],
            slope_OB[:, here],
            gram_BB[here, here],
            change_OM,
            pattern,
        )
        slope_OB[:, rest].addmm_(change_OM, gram_BB[here, rest])
    return change_OB


def _exchange(
    weight_OM: torch.Tensor,
    mask_OM: torch.Tensor,
    slope_OM: torch.Tensor,
    gram_MM: torch.Tensor,
    change_OM: torch.Tensor,
    pattern: Pattern,
) -> None:
    """Make the best exchange of a group in every row that gains by it, in place; the change of r
    goes to ``change_OM``. Units change places as a whole; U is their number in a group.
    """
    unit, kept_OU = pattern.unit, pattern.of_units(mask_OM)
    product_OMM = weight_OM[:, :, None] * weight_OM[:, None, :] * gram_MM
    product_OUU = pattern.sum_of_units(pattern.sum_of_units(product_OMM).mT).mT
    square_OU = product_OUU.diagonal(dim1=1, dim2=2)
    linear_OU = pattern.sum_of_units(2 * weight_OM * slope_OM)
    # The change of the error when a removed unit comes back (row of the pair), when a kept unit
    # goes (column of the pair), and the term of both.
    back_OU = (square_OU - linear_OU).masked_fill(kept_OU, torch.inf)
    away_OU = (square_OU + linear_OU).masked_fill(~kept_OU, torch.inf)
    pair_OUU = back_OU[:, :, None] + away_OU[:, None, :] - 2 * product_OUU
    gain_O, pair_O = pair_OUU.flatten(1).min(dim=1)
    size_OU = square_OU + linear_OU.abs()
    units = pattern.units.m
    places = (pair_O // units)[:, None], (pair_O % units)[:, None]
    size_O1 = size_OU.gather(1, places[0]) + size_OU.gather(1, places[1])
    gains_O1 = gain_O[:, None] < -LEAST_GAIN * size_O1
    for place_O1, sign in zip(places, (-1, 1), strict=True):
        for place in (place_O1 * unit + part for part in range(unit)):
            moved_O1 = torch.where(gains_O1, sign * weight_OM.gather(1, place), 0)
            change_OM.scatter_add_(1, place, moved_O1)
            mask_OM.scatter_(1, place, mask_OM.gather(1, place) ^ gains_O1)
