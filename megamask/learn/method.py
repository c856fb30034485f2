"""What a method of learning says about itself: its distribution, its learner, its checks, its cost.

The learning loop, the preflight and ``megamask plan`` ask these questions and nothing else, so that
a method is one file and one line in ``learn/methods.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from megamask.config import Config
from megamask.config.learn_tree import LearnSection
from megamask.data.blend import train_dataset
from megamask.sparsity.distribution import Distribution
from megamask.sparsity.draw import Site
from megamask.sparsity.pattern import Pattern

if TYPE_CHECKING:
    from megamask.learn.learner import Learner
    from megamask.learn.masked_model import MaskedModel
    from megamask.parallel.mesh import Mesh

WIDTH = {"fp32": 4, "bf16": 2}  # bytes per number

# The parts of the state, as tables name them.
WEIGHTS = "frozen weights"
MICRO_BATCH = "learn.micro_batch"  # free, unless masks are drawn for each
LOGITS = "mask logits"
GRADIENTS = "gradients"
MOMENTS = "optimizer moments"
HARD_CODES = "hard masks of the mask statistics"
KEPT = "masked weights kept for the backward pass"
STEP_GRADIENTS = "gradients at the masked weights of a step"
PARTS = (WEIGHTS, LOGITS, GRADIENTS, MOMENTS, HARD_CODES, KEPT, STEP_GRADIENTS)


@dataclass(frozen=True)
class StateOf:
    """A run whose state is to be counted.

    Attributes:
        pattern: N:M.
        learn: the settings of the learning run.
        accumulations: micro-batches of a step on one replica.
        replicas: of the run. Together they say how many micro-batches of a replica share a mask.
        dtype: of the frozen weights, ``bf16`` or ``fp32``.
        redrawn_share: the share of the weights whose masked weights ``parallel.recompute`` makes
            again with the activations.
        moments_share: the share of the layers that one replica updates, 1 / replicas where the
            layers divide evenly.
    """

    pattern: Pattern
    learn: LearnSection
    accumulations: int = 1
    dtype: str = "bf16"
    redrawn_share: float = 0.0
    moments_share: float = 1.0
    replicas: int = 1


@dataclass(frozen=True)
class TrialUpdate:
    """One update of the mask logits of a small layer, to compare kernels with plain PyTorch.

    Attributes:
        name: of the update, in messages.
        make: makes the update, compiled (True) or in plain PyTorch (False), and returns what it
            leaves.
        tolerance: how far the two may differ, as a share of the largest number; 0 = not in a bit.
    """

    name: str
    make: Callable[[bool], list[torch.Tensor]]
    tolerance: float = 0.0


class Method(ABC):
    """A method of learning masks.

    Attributes:
        name: ``learn.method``.
        distribution: of the masks that are learned.
        implied: dotted settings without effect -> the value that the method has anyway, which is
            no mistake where it is given.
    """

    name: str
    distribution: Distribution
    implied: ClassVar[Mapping[str, Any]] = {}

    def check_settings(self, config: Config, pattern: Pattern) -> None:  # noqa: B027
        """Check the settings as far as they alone decide, wherever the run will be.

        Raises:
            ConfigError: settings that the method cannot work with.
        """

    def check(self, config: Config, pattern: Pattern) -> None:
        """Check the settings, and what they need on this machine, before the model is loaded.

        Raises:
            ConfigError: as ``check_settings``, or a package or a compiler is missing.
        """
        self.check_settings(config, pattern)

    @abstractmethod
    def build(self, config: Config, mesh: Mesh, masked_model: MaskedModel) -> Learner:
        """The learner of the mask logits of ``masked_model``."""

    @abstractmethod
    def state_bytes(self, run: StateOf) -> dict[str, float]:
        """Bytes per prunable weight of everything whose size grows with the weights, by part: keys
        of ``PARTS``. A part that the method does not have may be left out.
        """

    def logit_bytes(self, run: StateOf) -> float:
        """Bytes of mask logits per prunable weight."""
        return self.state_bytes(run)[LOGITS]

    def saved_bytes(self, run: StateOf) -> float:
        """Bytes per prunable weight that one rank writes into a snapshot: logits, and optimizer
        state where the method has an optimizer.
        """
        return self.logit_bytes(run)

    def copied_bytes(self, run: StateOf) -> float:
        """Bytes per prunable weight that are made beside the state to write or read a snapshot."""
        return 0.0

    @abstractmethod
    def unused_settings(self, learn: LearnSection) -> set[str]:
        """Dotted settings that change nothing under this method, whatever their value is."""

    def forward_passes(self, learn: LearnSection) -> int:
        """Forward passes of a micro-batch of a method without a backward pass; 0 = it has one."""
        return 0

    def try_update(self, config: Config, device: torch.device) -> None:  # noqa: B027
        """Take a step on a small layer where the update of a run works with a compiler alone.

        Raises:
            Exception: any that the compiler raises.
        """

    def trial_update(
        self,
        config: Config,
        site: Site,
        logits: torch.Tensor,
        gradient: torch.Tensor,
        backend: str,
    ) -> TrialUpdate | None:
        """An update of the logits of one layer; None where a run updates in plain PyTorch.

        Args:
            config: the settings.
            site: pattern and place of the layer.
            logits: (O, L, G), on the device of the run.
            gradient: of the logits, which a method without a backward pass leaves aside.
            backend: that draws the masks of the run.
        """
        return None

    def samples(self, config: Config) -> Any:
        """The samples of the run by number, in the order of learning."""
        whole = config.learn.steps * config.learn.global_batch
        return train_dataset(config, whole, config.data.seq_length, config.seed)

    def derived(self, config: Config) -> dict[str, float]:
        """Dotted settings that a resumed run compares beside those that were given: settings
        without a value, with the values that follow from others, and settings that are free under
        other methods and decide what this method learns.
        """
        return {}

    def announcement(self, config: Config) -> str | None:
        """A line for the log of a run that starts."""
        return None


def keys_of(learn: LearnSection, *sections: str) -> set[str]:
    """The dotted settings of some sections of ``learn``."""
    return {
        f"learn.{name}.{key}"
        for name in sections
        for key in type(getattr(learn, name)).model_fields
    }
