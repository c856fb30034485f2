"""What the step and the snapshots ask of an optimizer of mask logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)

from megamask.config.tree import OptimizerSection
from megamask.parallel.masked_linear import MaskedLinear


class MaskOptimizer(ABC):
    """An update rule for the mask logits of ``linears``. It reads ``main_grad``, the gradient that
    Megatron's DDP has summed.

    Attributes:
        linears: whose logits it updates.
        logits: those logits, in the same order.
        param_groups: one group, in which Megatron's scheduler sets the learning rate before every
            step.
        is_sole_owner: whether no other replica has these logits in its optimizer.
    """

    is_sole_owner = False

    def __init__(
        self, section: OptimizerSection, linears: Sequence[MaskedLinear], seed: int
    ) -> None:
        self.section, self.linears, self.seed = section, list(linears), seed
        self.logits = [
            linear.mask_logits for linear in self.linears if linear.mask_logits is not None
        ]
        self.param_groups: list[dict[str, Any]] = [
            {"lr": 0.0, "weight_decay": section.weight_decay}
        ]
        assert len(self.logits) == len(self.linears)

    @abstractmethod
    def step(self, step: int, rate: float, clip_factor: torch.Tensor) -> None:
        """Update every logit at learning rate ``rate`` with its gradient times ``clip_factor`` (0-d
        fp32). Leaves main_grad undefined.
        """

    @abstractmethod
    def state_tensors(self) -> list[torch.Tensor]:
        """Every tensor it keeps between steps."""

    @abstractmethod
    def moments(self) -> dict[str, list[torch.Tensor]]:
        """Its state for a snapshot, by name: a tensor shaped like its logits for each of them, the
        same in every layout.
        """

    @abstractmethod
    def load_moments(self, moments: dict[str, list[torch.Tensor]], steps: int) -> None:
        """Take over what ``moments`` gave, after ``steps`` updates."""

    def steps_done(self) -> int:
        """Updates so far, for rules that count them."""
        return 0

    def sharded_state_dict(
        self, logits: dict[str, Any], is_loading: bool = False
    ) -> dict[str, Any]:
        """Megatron's sharded state, split as ``logits``, the model's sharded state, is."""
        by_number = get_param_id_to_sharded_param_map(logits, self.logits)
        if self.is_sole_owner:  # else the first replica writes what all of them have
            by_number = {number: replace(one, replica_id=0) for number, one in by_number.items()}
        state = {
            name: {
                number: make_sharded_optimizer_tensor(
                    by_number[number], one, f"optimizer.state.{name}"
                )
                for number, one in enumerate(ones)
            }
            for name, ones in self.moments().items()
        }
        return {"state": state, "steps": self.steps_done()}

    def load_state_dict(self, loaded: dict[str, Any]) -> None:
        """Take over a loaded ``sharded_state_dict``."""
        self.load_moments(
            {
                name: [ones[number] for number in range(len(ones))]
                for name, ones in loaded["state"].items()
            },
            loaded["steps"],
        )
