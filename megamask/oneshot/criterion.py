"""The interface of a one-shot criterion, and the result that every criterion returns.

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from megamask.config.tree import PruneSection
from megamask.oneshot.stats import Statistics
from megamask.sparsity.pattern import Pattern


@dataclass(frozen=True)
class Pruned:
    """The result for one linear.

    Attributes:
        mask_OI: bool, True = keep, exactly n of every m.
        score_OI: the scores by which the mask was chosen, of any unit: the n largest of every group
            are kept, but for terms of two weights in a polish. Their margins are the degrees of a
            prior (``sparsity/margins.py``).
        weight_OI: updated weight in the dtype of the original weight, with +0.0 in pruned places;
            None when the original weight stays.
        damp: the damping that SparseGPT used in the end, which is larger than ``prune.damp`` when
            the Hessian needed more; None for the other criteria.
    """

    mask_OI: torch.Tensor
    score_OI: torch.Tensor
    weight_OI: torch.Tensor | None = None
    damp: float | None = None


class Criterion(ABC):
    """A rule that prunes a linear at once, without learning.

    Attributes:
        algorithm: a name that a criterion shares with the criterion that gives the same masks and
            also updated weights; where both are asked for, the work is done once. Empty for a
            criterion without such a twin.
        reads: the settings of the section ``prune`` that decide the mask.
        facts: what beside the settings decides mask and margins: a file without them was made by an
            earlier rule, and is made again.
        needs_stats: whether the criterion reads the statistics of the calibration inputs.
        needs_hessian: whether the criterion reads the Hessian of the calibration inputs too.
        needs_gradients: whether the criterion reads the gradients of the calibration samples.
        mixes_rows: whether the score of a weight depends on other rows. The criterion then gets the
            whole weight of one Hugging Face linear, and otherwise any rows of one or several.
        updates_weight: whether ``Pruned.weight_OI`` replaces the weight.
    """

    algorithm = ""
    reads: tuple[str, ...] = ()
    facts: Mapping[str, str] = MappingProxyType({})
    needs_stats = False
    needs_hessian = False
    needs_gradients = False
    mixes_rows = False
    updates_weight = False

    @property
    def needs_text(self) -> bool:
        """Whether the criterion needs calibration samples."""
        return self.needs_stats or self.needs_gradients

    def check(self, pattern: Pattern, settings: PruneSection) -> None:  # noqa: B027
        """Refuse settings that cannot work, before any calibration.

        Raises:
            ConfigError: a setting does not fit the pattern.
        """

    @abstractmethod
    def prune(
        self,
        weight_OI: torch.Tensor,
        stats: Statistics,
        pattern: Pattern,
        settings: PruneSection,
    ) -> Pruned:
        """Choose the mask of a linear.

        Args:
            weight_OI: weight of whole rows, any float dtype; all rows with ``mixes_rows``.
            stats: what calibration measured of the linear, as far as the criterion needs it.
            pattern: the N:M pattern.
            settings: the section ``prune``.

        Raises:
            ConfigError: m does not divide in_features, or the statistics cannot be used.
        """
