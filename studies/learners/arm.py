"""An arm of the study: a row of the report, and the group that it is compared in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Settings = dict[str, Any]

# The common settings of all learners by gradients: the defaults (the preset ``best``), with ablated
# settings by name. Steps and batch come from the command line, the rate from megamask. A short run
# has no time to undo random flips, so it starts from the prior alone and with nearly hard masks.
GRADIENT: Settings = {
    "method": "subset",
    "sampling.mode": "soft",
    "sampling.draws": "micro_batch",
    "sampling.kappa": [100, 500],
    "sampling.tau": [1, 0.05],
    "sampling.initial_noise": False,
    "prior.mask": "sparsegpt",
    "prior.strength": 3,
    "optimizer.kind": "adamw",
    "optimizer.epsilon": [1e-8, 0.1],
    "weight_norm": [1e-5, 0],
}


@dataclass(frozen=True)
class Arm:
    """A row of the report; the arm of the one-shot masks has a row for each method.

    Attributes:
        name: the name for ``--arms``.
        group: key of ``GROUPS``.
        label: first column of the table.
        settings: settings that are added to ``common``.
        pattern: the N:M pattern.
        paper: the perplexity that MaskLLM's paper reports for this setting, or None.
        common: the common settings of this kind of arm; None for an arm that learns nothing.
        share_of_steps: share of the budget's steps, for an arm that is to take the same time as
            the others instead of the same number of tokens.
        rate: factor of the learning rate that megamask derives from the run.
        batch: factor of the budget's sequences a step.
    """

    name: str
    group: str
    label: str
    settings: Settings = field(default_factory=dict)
    pattern: str = "2:4"
    paper: float | None = None
    common: Settings | None = field(default_factory=lambda: GRADIENT)
    share_of_steps: float = 1.0
    rate: float = 1.0
    batch: int = 1

    @property
    def learns(self) -> bool:
        """Whether the arm learns a mask, and does not only evaluate one-shot masks."""
        return self.common is not None

    @property
    def prior(self) -> str | None:
        """The mask that learning starts from; presets without a prior mask take SparseGPT's."""
        return {"prior.mask": "sparsegpt", **(self.common or {}), **self.settings}["prior.mask"]


@dataclass(frozen=True)
class Group:
    """A table of the report.

    Attributes:
        title: the heading.
        reference: name of the arm that the others are compared with.
        text: the setting that varies, and the table of the paper that varies it.
    """

    title: str
    reference: str
    text: str
