"""What AdamW's updates are made of: how much of the gradient is signal, how many logits move by
less than the rate because their gradients are small, and how long a step is.

The first moment averages away noise that the second moment counts in full, so both moments tell the
two apart without a second gradient and at any layout. Source of the noise scale: McCandlish et al.
2018, "An Empirical Model of Large-Batch Training", Eq. 2.8 (the simple noise scale).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megamask.optim.base import MaskOptimizer

if TYPE_CHECKING:
    from megamask.parallel.mesh import Mesh


@dataclass(frozen=True, kw_only=True)
class UpdateMeasure:
    """Means over all logits of the model.

    Attributes:
        signal_share: |G|^2 / E|g|^2, the share of the squared gradient of a step that its
            expectation G makes up, in [0, 1]. It takes G for constant over the last 1 / (1 - beta1)
            steps, and so is too low where G turns. The batch whose signal is as large as its noise
            (the simple noise scale) has (1 - share) / share times the tokens of a step.
        below_epsilon: share of logits whose root mean square gradient is below epsilon. They move
            in proportion to their mean gradient, as under SGD with momentum; the others move by
            about the rate.
        relative_step: mean length of a logit's move, weight decay left out, in units of the rate.
    """

    signal_share: float
    below_epsilon: float
    relative_step: float


@torch.no_grad()
def measure_update(optimizer: MaskOptimizer, mesh: Mesh) -> UpdateMeasure:
    """One pass over AdamW's moments after an update. All ranks must call it; the host waits for the
    device.

    Args:
        optimizer: has an ``epsilon``.
        mesh: the ranks, over whose shards the sums go.
    """
    assert optimizer.epsilon is not None
    moments, (one, two) = optimizer.moments(), optimizer.section.decays
    steps = optimizer.steps_done()
    corrections = (1 - one**steps, 1 - two**steps)
    pairs = zip(moments["exp_avg"], moments["exp_avg_sq"], strict=True)
    sums = torch.stack([_sums(*pair, corrections, optimizer.epsilon) for pair in pairs]).sum(0)
    if optimizer.is_sole_owner:
        sums = mesh.mean_over_dp(sums) * mesh.dp
    mean, square, below, moves, logits = mesh.sum_over_tp(sums).tolist()
    return UpdateMeasure(
        signal_share=signal_share(mean, square, averaged(one, steps)),
        below_epsilon=below / logits,
        relative_step=moves / logits,
    )


def averaged(beta: float, steps: int) -> float:
    """The sum of the squared weights of a bias-corrected moving average of ``steps`` values: the
    share of independent noise's mean square that the average keeps.
    """
    return (1 - beta) / (1 + beta) * (1 + beta**steps) / (1 - beta**steps)


def signal_share(mean: float, square: float, kept: float) -> float:
    """|G|^2 / E|g|^2 in [0, 1], of E|m|^2 = |G|^2 + kept |noise|^2 and E|g|^2 = |G|^2 + |noise|^2.

    Args:
        mean: |m|^2, of the averaged gradient.
        square: E|g|^2.
        kept: the share of the noise's square that the average keeps; 1 says nothing, and gives 0.
    """
    if square <= 0 or kept >= 1:
        return 0.0
    return min(1.0, max(0.0, (mean / square - kept) / (1 - kept)))


def _sums(
    mean: torch.Tensor, square: torch.Tensor, corrections: tuple[float, float], epsilon: float
) -> torch.Tensor:
    """|m|^2, |g|^2, logits below epsilon, the sum of all moves, and the number of logits: (5,)
    fp64. ``mean`` and ``square`` are moments of one linear, before bias correction.
    """
    average = mean.float() / corrections[0]
    root = (square.float() / corrections[1]).sqrt_()
    return torch.stack(
        [
            torch.linalg.vector_norm(average).double().square(),
            torch.linalg.vector_norm(root).double().square(),
            (root < epsilon).sum().double(),
            average.abs_().div_(root.add_(epsilon)).sum(dtype=torch.float64),
            torch.tensor(float(mean.numel()), dtype=torch.float64, device=mean.device),
        ]
    )
