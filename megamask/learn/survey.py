"""How the mask distribution moves: winner masks, their confidence, flips. Reads logits only; draws no noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megamask.learn.setup import Subject
from megamask.parallel.mesh import Mesh


@dataclass(frozen=True)
class Movement:
    """Shares of all groups of the model.

    Attributes:
        max_prob: mean over groups of the largest probability softmax(kappa pi).
        flip_rate: share of groups whose winner changed since the last survey.
        prior_difference: share of groups whose winner is not that of the initial logits.
    """

    max_prob: float
    flip_rate: float
    prior_difference: float


class Survey:
    """Keeps the winners of the start and of the last look, (O, G) uint8 a linear."""

    def __init__(self, subject: Subject, mesh: Mesh) -> None:
        self.subject, self.mesh = subject, mesh
        self.initial = {name: winner for name, (winner, _) in self._look(1.0).items()}
        self.latest = self.initial

    def catch_up(self) -> None:
        """Take the winners of now as those of the last look: after a resume, flips count from the snapshot."""
        self.latest = {name: winner for name, (winner, _) in self._look(1.0).items()}

    def __call__(self, kappa: float) -> Movement:
        """Compare with the last call and with the start."""
        now = self._look(kappa)
        counts = torch.zeros(4, dtype=torch.float64, device=self.mesh.device)
        for name, (winner, largest) in now.items():
            flips, moved = (winner != self.latest[name]).sum(), (winner != self.initial[name]).sum()
            counts += torch.stack([largest.double(), flips.double(), moved.double(), torch.tensor(float(winner.numel())).double()]).to(
                counts
            )
        self.latest = {name: winner for name, (winner, _) in now.items()}
        largest, flips, moved, groups = self.mesh.sum_over_tp(counts).tolist()
        return Movement(largest / groups, flips / groups, moved / groups)

    def _look(self, kappa: float) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        linears = self.subject.linears.items()
        return {name: linear.backend.survey(linear.mask_logits, kappa) for name, linear in linears}
