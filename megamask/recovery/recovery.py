"""What every method of recovery is given, and what it gives back.

Shapes: O local out_features, I local in_features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from megamask.config import Config
from megamask.oneshot.layerwise import PruningJob
from megamask.prepare.run_inputs import RunInputs
from megamask.recovery.unfinished import Unfinished


@dataclass(frozen=True)
class RecoveryJob(PruningJob):
    """The dense model, and the linears that have a mask.

    Attributes:
        masks_OI: Megatron name -> this rank's shard of the mask, in host memory. A part of a fused
            linear without a mask keeps everything, and its weights stay.
        dtype: of the weights on disk, which the recovered weights get.
        unfinished: the work of a run that was killed.
    """

    masks_OI: Mapping[str, torch.Tensor]
    dtype: torch.dtype
    unfinished: Unfinished


@dataclass
class Recovered:
    """The result of a recovery.

    Attributes:
        weights_OI: Megatron name -> this rank's shard of the new weights, in the dtype of the
            weights on disk, +0.0 outside the mask, in host memory.
        measured: what the method measured of its own work, as JSON values.
    """

    weights_OI: dict[str, torch.Tensor] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)


class Recovery(ABC):
    """A method that gives the kept weights new values under a fixed mask.

    Attributes:
        reads: the settings of the section ``recover`` that decide the weights.
    """

    reads: tuple[str, ...] = ()

    def check_early(self, inputs: RunInputs) -> None:  # noqa: B027
        """Refuse settings and layouts that cannot work, before anything is read.

        Raises:
            ConfigError: naming the setting.
        """

    @abstractmethod
    def lengths(self) -> tuple[str, ...]:
        """The settings with the lengths of the sequences that run through the model."""

    @abstractmethod
    def text(self, config: Config) -> dict[str, Any]:
        """The text that decides the weights, as the keys of a mask file's ``data`` have it.

        Raises:
            MegamaskError: text that is missing.
        """

    @abstractmethod
    def recover(self, job: RecoveryJob) -> Recovered:
        """Find the new weights. All ranks must call this method. The weights of the model do not
        change, and its linears compute with any weights afterwards.

        Raises:
            MegamaskError: inputs or gradients that are not finite, or what the method cannot do.
        """


def kept_weights(
    weight_OI: torch.Tensor, mask_OI: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The weights (O, I) in ``dtype``, with +0.0 outside the mask: a product would leave -0.0."""
    return weight_OI.detach().to(dtype).masked_fill(~mask_OI.to(weight_OI.device), 0.0)
