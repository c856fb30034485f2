"""The two sides of an update rule: ``UpdateRule`` states facts about it before a model exists,
``MaskOptimizer`` is the rule at work on the mask logits of one rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from megamask.config.learn_tree import OptimizerSection

if TYPE_CHECKING:  # Megatron's import takes seconds, and megamask.plan needs the facts alone
    import torch

    from megamask.parallel.masked_linear import MaskedLinear


class MaskOptimizer(ABC):
    """An update rule at work on the mask logits of ``linears``. It reads ``main_grad``, the
    gradient that is summed over micro-batches and replicas.

    Attributes:
        linears: the masked linears whose logits it updates.
        logits: their logits, in the same order.
        is_sole_owner: whether no other replica updates these logits.
        epsilon: the number that the rule adds to the root of its second moment; None where
            ``moments`` are not AdamW's ``exp_avg`` and ``exp_avg_sq`` themselves.
    """

    is_sole_owner = False
    epsilon: float | None = None

    def __init__(
        self, section: OptimizerSection, linears: Sequence[MaskedLinear], seed: int
    ) -> None:
        self.section, self.linears, self.seed = section, list(linears), seed
        self.logits = [
            linear.mask_logits for linear in self.linears if linear.mask_logits is not None
        ]
        assert len(self.logits) == len(self.linears)

    @abstractmethod
    def step(self, step: int, rate: float, clip_factor: torch.Tensor) -> None:
        """Update all logits at learning rate ``rate`` from their gradients times ``clip_factor``
        (0-d fp32). The contents of ``main_grad`` are undefined afterwards.
        """

    @abstractmethod
    def state_tensors(self) -> list[torch.Tensor]:
        """All tensors that the rule keeps between steps."""

    @abstractmethod
    def moments(self) -> dict[str, list[torch.Tensor]]:
        """The state for a snapshot, by name: for each logits tensor a tensor of the same shape,
        whose values do not depend on the layout.
        """

    @abstractmethod
    def load_moments(self, moments: dict[str, list[torch.Tensor]], steps: int) -> None:
        """Restore the state from ``moments()`` of an optimizer that had made ``steps`` updates."""

    def steps_done(self) -> int:
        """The number of updates so far. Rules that do not count them return 0."""
        return 0

    def sharded_state_dict(
        self, logits: dict[str, Any], is_loading: bool = False
    ) -> dict[str, Any]:
        """Megatron's sharded state, split in the same way as ``logits``, the sharded state of the
        model.
        """
        from megatron.core.dist_checkpointing.optimizer import (
            get_param_id_to_sharded_param_map,
            make_sharded_optimizer_tensor,
        )

        by_number = get_param_id_to_sharded_param_map(logits, self.logits)
        if self.is_sole_owner:  # without ZeRO-1 the first replica writes the state of all
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
        """Restore the state from a loaded ``sharded_state_dict``."""
        self.load_moments(
            {
                name: [ones[number] for number in range(len(ones))]
                for name, ones in loaded["state"].items()
            },
            loaded["steps"],
        )


class UpdateRule(ABC):
    """The facts about an update rule that are needed before a model exists, and the way to build
    its optimizer.

    Attributes:
        name: value of ``learn.optimizer.kind``.
        rate_divisor: the derived learning rate is divided by it. AdamW, for which the rate is
            derived, has 1.
        warning_rate: the learning rate from which a warning is logged.
        rate_advice: the text of that warning.
        has_epsilon: whether the rule adds ``learn.optimizer.epsilon`` to a root.
        has_short_means: whether the derived decay of its first moment falls in short runs.
        second_decay: the second of ``betas`` where none is given.
    """

    name: ClassVar[str]
    rate_divisor: ClassVar[float] = 1.0
    warning_rate: ClassVar[float] = math.inf
    rate_advice: ClassVar[str] = ""
    has_epsilon: ClassVar[bool] = False
    has_short_means: ClassVar[bool] = False
    second_decay: ClassVar[float] = 0.95

    def check(self, device: str) -> None:  # noqa: B027 (most rules need nothing)
        """Check that everything the rule needs on ``device`` ("cpu" or "cuda") is installed.

        Raises:
            ConfigError: a package or a compiler is missing.
        """

    def try_out(self, device: torch.device, logits_dtype: torch.dtype) -> None:  # noqa: B027
        """Take a step on a small layer where a compiler makes the update and plain PyTorch cannot,
        so that a compiler that fails is known before a model is loaded.

        Raises:
            Exception: any that the compiler raises.
        """

    def has_kernels(self, logits_dtype: str) -> bool:
        """Whether kernels, which give the bits of plain PyTorch, update logits of this dtype: by
        numba on a CPU, by Triton on CUDA.
        """
        return False

    @abstractmethod
    def moment_bytes(self, logits_dtype: str, logits_per_group: int) -> float:
        """Bytes of optimizer state per mask logit.

        Args:
            logits_dtype: dtype of the logits, "fp32" or "bf16".
            logits_per_group: logits of each group of M weights.
        """

    def saved_bytes(self, logits_dtype: str, logits_per_group: int) -> float:
        """Bytes of optimizer state per mask logit in a snapshot."""
        return self.moment_bytes(logits_dtype, logits_per_group)

    def copied_bytes(self) -> float:
        """Bytes per mask logit that ``moments`` makes on the host beside the state, for a snapshot;
        one linear at a time is converted on the device.
        """
        return 0.0

    @abstractmethod
    def build(
        self,
        section: OptimizerSection,
        linears: Sequence[MaskedLinear],
        seed: int,
        *,
        use_kernels: bool,
        logits_dtype: str,
        epsilon: float,
    ) -> MaskOptimizer:
        """The optimizer of the mask logits of ``linears``.

        Args:
            section: ``learn.optimizer``.
            linears: the masked linears of this rank whose logits this replica updates.
            seed: of stochastic rounding.
            use_kernels: whether the kernels of the logits' device may be used.
            logits_dtype: dtype of the logits, "fp32" or "bf16".
            epsilon: the number that a rule adds to the root of a mean square gradient.
        """
