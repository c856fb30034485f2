"""How the mask distribution moves: winner masks, their confidence, flips. Draws no noise."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megamask.learn.masked_model import MaskedModel
from megamask.parallel.mesh import Mesh


@dataclass(frozen=True)
class MaskStats:
    """Shares of all groups of the model, of the logits that a step started from.

    Attributes:
        max_prob: mean over groups of the largest probability softmax(kappa pi).
        flip_rate: share of groups whose winner changed in the step before; None right after a
            resume and without ``learn.state.track_flips``.
        prior_difference: share of groups whose winner is not that of the initial logits; None
            without ``learn.state.track_flips``.
    """

    max_prob: float
    flip_rate: float | None = None
    prior_difference: float | None = None


class MaskStatistics:
    """Reads what the first draw of a step saw in passing, and compares its winners with those of
    the step before and of the start.

    Args:
        masked_model: the model; its logits are still the initial ones.
        mesh: the processes.
        movement: keep winners, 2 x (O, G) uint8 a linear, to count flips.
    """

    def __init__(self, masked_model: MaskedModel, mesh: Mesh, movement: bool = True) -> None:
        self.masked_model, self.mesh = masked_model, mesh
        self.initial = (
            {
                linear.parameter_id: linear.mask_statistics(1.0)[0]
                for linear in masked_model.linears.values()
            }
            if movement
            else {}
        )
        self.latest = self.initial
        self._groups = self._sum(
            [
                torch.tensor(float(linear.mask_logits[:, 0].numel()))
                for linear in masked_model.linears.values()
            ]
        )  # type: ignore[index]

    def forget_latest(self) -> None:
        """The next call cannot know what flipped: the winners of the step before were not kept over
        a resume.
        """
        self.latest = {}

    def __call__(self) -> MaskStats:
        """What the last step saw."""
        measured = self.masked_model.switch.mask_statistics
        largest = self._sum(total for _, total in measured.values())
        flips, moved = self._differing(self.latest), self._differing(self.initial)
        if self.initial:
            self.latest = {key: hard_codes for key, (hard_codes, _) in measured.items()}
        measured.clear()
        return MaskStats(largest / self._groups, flips, moved)

    def _differing(self, hard_codes: dict[int, torch.Tensor]) -> float | None:
        """Share of groups whose winner is another now; None when ``hard_codes`` were not kept."""
        measured = self.masked_model.switch.mask_statistics
        return (
            self._sum(
                torch.count_nonzero(measured[key][0] != old) for key, old in hard_codes.items()
            )
            / self._groups
            if hard_codes
            else None
        )

    def _sum(self, terms: Iterable[torch.Tensor]) -> float:
        total = torch.stack([term.to(self.mesh.device, torch.float64) for term in terms]).sum()
        return float(self.mesh.sum_over_tp(total))
