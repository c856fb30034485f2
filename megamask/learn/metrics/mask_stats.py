"""How the mask distribution moves: confidence of the hard masks, and the share of them that flips.
No noise is drawn for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megamask.learn.masked_model import MaskedModel
from megamask.parallel.mask_context import Measured
from megamask.parallel.mesh import Mesh

PIECE = 1 << 23  # hard codes that are counted at a time


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

    The codes of all linears lie in one tensor, so the number of kernels that compare them does not
    grow with the layers, and a difference of integers, which wraps, is taken in place. The host
    waits for the device once a step.

    Args:
        masked_model: the model; its logits are still the initial logits.
        mesh: the processes.
        track_flips: keep hard codes, 2 x (O, G) a linear, to count flips.

    Attributes:
        initial: hard codes at the start, (groups,); None without flip tracking.
        latest: hard codes that the step before started from, (groups,).
    """

    def __init__(self, masked_model: MaskedModel, mesh: Mesh, track_flips: bool = True) -> None:
        self.mesh, self.initial, self.latest = mesh, None, None
        linears = masked_model.linears.values()
        self._views: dict[int, torch.Tensor] = {}
        self._has_latest = track_flips
        if track_flips:
            codes = {one.parameter_id: one.hard_codes() for one in linears}
            self.initial = torch.cat([one.flatten() for one in codes.values()])
            self.latest = self.initial.clone()
            parts = self.latest.split([one.numel() for one in codes.values()])
            views = (part.view_as(one) for part, one in zip(parts, codes.values(), strict=True))
            self._views = dict(zip(codes, views, strict=True))
        groups = sum(one[:, 0].numel() for one in masked_model.mask_logits)
        self._groups = self._over_tp(torch.tensor([float(groups)]))[0]

    def forget_latest(self) -> None:
        """Leave out the next flip rate. A resume calls it: the hard masks of the step before were
        not kept.
        """
        self._has_latest = False

    def __call__(self, first_draw: Mapping[int, Measured]) -> MaskStats:
        """The statistics of a step, from what its first draw measured."""
        sums = [torch.stack([one.largest for one in first_draw.values()]).double().sum()]
        sums += [count.double() for count in self._differing(first_draw)]
        probability, *shares = (one / self._groups for one in self._over_tp(torch.stack(sums)))
        flips, moved = shares or (None, None)
        has_latest, self._has_latest = self._has_latest, bool(shares)
        return MaskStats(probability, flips if has_latest else None, moved)

    def _differing(self, first_draw: Mapping[int, Measured]) -> list[torch.Tensor]:
        """How many groups have another hard mask than in the step before and than at the start;
        empty where nothing was kept. The masks become the latest.
        """
        if self.initial is None or self.latest is None:
            return []
        views = list(self._views.values())
        codes = [first_draw[key].hard_codes for key in self._views]
        torch._foreach_sub_(views, codes)
        flips = _nonzero(self.latest)
        torch._foreach_copy_(views, codes)
        moved = _nonzero(self.initial.sub_(self.latest))
        self.initial.add_(self.latest)
        return [flips, moved]

    def _over_tp(self, sums: torch.Tensor) -> list[float]:
        """The sums over shards, fp64, on the host."""
        here = sums.to(self.mesh.device, torch.float64)
        whole: list[float] = self.mesh.sum_over_tp(here).tolist()
        return whole


def _nonzero(codes: torch.Tensor) -> torch.Tensor:
    """How many codes are not 0, 0-d. ``PIECE`` of them are counted at a time, because CUDA takes 9
    bytes of working memory for each.
    """
    return torch.stack([piece.count_nonzero() for piece in codes.split(PIECE)]).sum()
