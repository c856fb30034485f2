"""What the learning loop and the snapshots ask of a learner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from megamask.data.batches import BatchPlan
    from megamask.parallel.mask_context import Measured


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step gives back: the numbers for its record, and what its first draw measured.

    Attributes:
        lm_loss: cross entropy of the text in nats, even where something else is minimised.
        loss: the loss that is minimised.
        lr: learning rate.
        first_draw: what the first draw of the step measured of the logits that the step started
            from, by parameter id.
    """

    lm_loss: float
    loss: float
    lr: float
    first_draw: Mapping[int, Measured] = field(default_factory=dict, repr=False, compare=False)

    def metrics(self) -> dict[str, float | None]:
        """The numbers by name."""
        return {
            one.name: getattr(self, one.name) for one in fields(self) if one.name != "first_draw"
        }


class Learner(Protocol):
    """Moves the mask logits of a masked model, one step at a time."""

    def step(self, step: int, plan: BatchPlan) -> StepResult:
        """Learn from the global batch of ``step`` (counted from 0).

        Raises:
            LearningError: nothing was learned, and the logits are unchanged.
        """
        ...

    def state(self, logits: dict[str, Any], is_loading: bool = False) -> dict[str, Any]:
        """Everything that must outlive a restart besides the logits.

        Args:
            logits: the sharded state of the mask logits, which the state is split like.
            is_loading: whether the state is to be filled from a snapshot.
        """
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Take over a loaded ``state``."""
        ...
