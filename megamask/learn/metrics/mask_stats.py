"""How the mask distribution moves: confidence of the hard masks, and the share of them that flips.
No noise is drawn for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from megamask.learn.masked_model import MaskedModel
from megamask.parallel.mask_context import Measured
from megamask.parallel.mesh import Mesh


@dataclass(frozen=True)
class MaskStats:
    """Shares of all groups of the model, by the logits that a step started from.

    Attributes:
        max_prob: mean over groups of the largest probability softmax(kappa pi).
        flip_rate: share of groups whose hard mask changed in the step before; None right after a
            resume and without flip tracking.
        prior_difference: share of groups whose hard mask differs from that of the initial logits;
            None without flip tracking.
    """

    max_prob: float
    flip_rate: float | None = None
    prior_difference: float | None = None


class MaskStatistics:
    """Compares the hard masks that a step started from with those of the step before and those of
    the start.

    Args:
        masked_model: the model; its logits are still the initial logits.
        mesh: the processes.
        track_flips: keep hard codes, 2 x (O, G) a linear, to count flips.
    """

    def __init__(self, masked_model: MaskedModel, mesh: Mesh, track_flips: bool = True) -> None:
        self.mesh = mesh
        linears = masked_model.linears.values()
        self.initial: dict[int, torch.Tensor] = {}
        if track_flips:
            self.initial = {one.parameter_id: one.mask_statistics(1.0)[0] for one in linears}
        self.latest = self.initial
        groups = (one[:, 0].numel() for one in masked_model.mask_logits)
        self._groups = self._sum(torch.tensor(float(number)) for number in groups)

    def forget_latest(self) -> None:
        """Leave out the next flip rate. A resume calls it: the hard masks of the step before were
        not kept.
        """
        self.latest = {}

    def __call__(self, first_draw: Mapping[int, Measured]) -> MaskStats:
        """The statistics of a step, from what its first draw measured."""
        largest = self._sum(one.largest for one in first_draw.values())
        flips = self._differing(first_draw, self.latest)
        moved = self._differing(first_draw, self.initial)
        if self.initial:
            self.latest = {key: one.hard_codes for key, one in first_draw.items()}
        return MaskStats(largest / self._groups, flips, moved)

    def _differing(
        self, first_draw: Mapping[int, Measured], before: Mapping[int, torch.Tensor]
    ) -> float | None:
        """Share of groups whose hard mask differs from ``before``; None where nothing was kept."""
        if not before:
            return None
        differing = (
            torch.count_nonzero(first_draw[key].hard_codes != old) for key, old in before.items()
        )
        return self._sum(differing) / self._groups

    def _sum(self, terms: Iterable[torch.Tensor]) -> float:
        """The sum over layers and shards."""
        total = torch.stack([term.to(self.mesh.device, torch.float64) for term in terms]).sum()
        return float(self.mesh.sum_over_tp(total))
