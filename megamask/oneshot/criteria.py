"""The table of one-shot methods: what each needs, and how to call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megamask.config.tree import PruneSection
from megamask.oneshot.magnitude import magnitude
from megamask.oneshot.pruned import Pruned
from megamask.oneshot.sparsegpt import check_block, sparsegpt
from megamask.oneshot.stats import InputStats
from megamask.oneshot.wanda import wanda
from megamask.sparsity.pattern import Pattern

Prune = Callable[[torch.Tensor, InputStats | None, Pattern, PruneSection], Pruned]


@dataclass(frozen=True)
class Criterion:
    """One method.

    Attributes:
        prune: (weight_OI, stats, pattern, settings) -> Pruned; stats may be None when
            ``needs_stats`` is False.
        needs_stats: reads the calibration inputs.
        needs_hessian: reads their Hessian too.
        updates_weight: ``Pruned.weight_OI`` replaces the weight.
    """

    prune: Prune
    needs_stats: bool = False
    needs_hessian: bool = False
    updates_weight: bool = False

    def check(self, pattern: Pattern, settings: PruneSection) -> None:
        """Refuse settings that cannot work, before any calibration.

        Raises:
            ConfigError: SparseGPT's block is not a multiple of m.
        """
        if self.needs_hessian:
            check_block(settings.block, pattern)


def _magnitude(
    weight_OI: torch.Tensor, _: InputStats | None, pattern: Pattern, settings: PruneSection
) -> Pruned:
    return magnitude(weight_OI, pattern)


def _wanda(
    weight_OI: torch.Tensor, stats: InputStats | None, pattern: Pattern, settings: PruneSection
) -> Pruned:
    assert stats is not None
    return wanda(weight_OI, stats, pattern)


def _sparsegpt(update: bool) -> Prune:
    def prune(
        weight_OI: torch.Tensor, stats: InputStats | None, pattern: Pattern, settings: PruneSection
    ) -> Pruned:
        assert stats is not None
        return sparsegpt(weight_OI, stats, pattern, settings.damp, settings.block, update)

    return prune


CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion(_magnitude),
    "wanda": Criterion(_wanda, needs_stats=True),
    "sparsegpt": Criterion(_sparsegpt(update=False), needs_stats=True, needs_hessian=True),
    "sparsegpt_update": Criterion(
        _sparsegpt(update=True), needs_stats=True, needs_hessian=True, updates_weight=True
    ),
}
