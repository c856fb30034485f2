"""ADMM pruning (Boža, "Fast and Effective Weight Update for Pruned Large Language Models", TMLR
2024, Algorithms 1 and 2, with the constants of the paper's code).

Among the weights under a mask, the alternating direction method of multipliers looks for those
whose outputs on the calibration inputs are nearest to the outputs of the dense weights. It solves
one system with the Gram matrix again and again, so one inverse serves all steps. Inputs are scaled
to norm 1 first; the size of a scaled weight is Wanda's score.

The mask thins out during the first steps. The N largest scaled weights of every group are safe, and
of the others of the whole linear the smallest go, a share that rises as a cubic up to all of them.

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

import torch

from megamask.config.tree import PruneSection
from megamask.oneshot.criterion import Criterion, Pruned
from megamask.oneshot.stats import InputStats, Statistics
from megamask.sparsity.pattern import Pattern

STEPS = 20
PENALTY = 1.0  # rho: how strongly a step draws the weights to the mask
DAMP = 0.1  # share of the mean diagonal that is added to the Gram matrix
DEAD = 1e-8  # norm of an input that was always zero, in units of the largest norm


class ADMM(Criterion):
    """The mask of ADMM with gradual pruning and, with ``update``, the weights that it ends with.

    The mask is the same with and without ``update``. ``prune.gradual`` = 0 takes Wanda's mask.
    """

    algorithm = "admm"
    reads = ("gradual",)
    needs_stats = True
    needs_hessian = True
    mixes_rows = True  # the weights that go first are the smallest of the whole linear

    def __init__(self, update: bool) -> None:
        self.updates_weight = update

    def prune(
        self, weight_OI: torch.Tensor, stats: Statistics, pattern: Pattern, settings: PruneSection
    ) -> Pruned:
        """Choose the mask with ``prune.gradual``; raises as ``admm``."""
        return admm(weight_OI, stats.of_inputs, pattern, settings.gradual, self.updates_weight)


@torch.no_grad()
def admm(
    weight_OI: torch.Tensor,
    stats: InputStats,
    pattern: Pattern,
    gradual: int = 15,
    update: bool = True,
) -> Pruned:
    """Prune a linear: the mask (O, I) and, with ``update``, the updated weight.

    Args:
        weight_OI: all rows, any float dtype; the work is done in fp32.
        stats: statistics of the whole input, with the Hessian.
        pattern: the N:M pattern.
        gradual: number of steps, of ``STEPS``, over which the mask thins out; 0 chooses it at once.
        update: False keeps the original weight (``weight_OI`` of the result is None).

    Raises:
        ConfigError: m does not divide in_features, there are no tokens, or the inputs are not
            finite.
    """
    pattern.groups(weight_OI.shape[1])
    gram_II = stats.hessian_II
    norm_I = gram_II.diagonal().sqrt()
    largest = norm_I.max()
    norm_I[norm_I == 0] = DEAD * torch.where(largest > 0, largest, 1)
    gram_II.div_(norm_I).div_(norm_I[:, None])
    gram_II.diagonal().add_(DAMP * gram_II.diagonal().mean())

    work_OI = weight_OI.detach().float() * norm_I
    goal_OI = work_OI @ gram_II  # the products of the dense weights
    gram_II.diagonal().add_(PENALTY)
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(gram_II))
    del gram_II

    score_OI = work_OI.abs()
    mask_OI = pattern.best(score_OI)
    for step in range(1, (STEPS if update else gradual) + 1):
        if step <= gradual:
            score_OI = work_OI.abs()
            mask_OI = _thin(score_OI, pattern, 1 - (1 - step / gradual) ** 3)
        if step == gradual and not update:
            break
        # The dual variable is what the mask takes off the work, so W + U is one tensor.
        kept_OI = torch.where(mask_OI, work_OI, 0)
        dual_OI = work_OI.sub_(kept_OI)
        work_OI = torch.addmm(dual_OI, goal_OI + PENALTY * (kept_OI - dual_OI), inverse_II)
    if not update:
        return Pruned(mask_OI, score_OI)
    updated_OI = torch.where(mask_OI, work_OI / norm_I, 0).to(weight_OI.dtype)
    return Pruned(mask_OI, score_OI, updated_OI)


def _thin(score_OI: torch.Tensor, pattern: Pattern, share: float) -> torch.Tensor:
    """The mask that lacks ``share`` of the weights that the pattern removes in the end: the
    smallest of those that are not among the N largest of their group.
    """
    safe_OI = pattern.best(score_OI)
    gone = int(score_OI.numel() * (1 - pattern.density) * share)
    if share == 1:
        return safe_OI
    at_risk_OI = pattern.expand(pattern.sum_of_units(score_OI)).masked_fill(safe_OI, torch.inf)
    # kthvalue would do, but has no deterministic form on CUDA
    return at_risk_OI >= at_risk_OI.flatten().sort().values[gone]
