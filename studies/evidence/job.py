"""A job of the study: a run folder, and the verbs that fill it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Words = tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """A run of some verbs on the base model, or on a model that another job wrote.

    Attributes:
        name: for ``--jobs`` and in the folder's name.
        verbs: each verb in its order, with words of its own; ``{run}`` is the run folder.
        settings: words ``key=value`` of all verbs.
        masks: name -> the job in whose run folder the mask of this name lies.
        model: the job whose folder ``reordered`` is the model, in the place of the base's.
        is_seeded: whether the seed decides the result: learning and what stands on it.
    """

    name: str
    verbs: tuple[tuple[str, Words], ...]
    settings: Words = ()
    masks: Mapping[str, Job] = field(default_factory=dict)
    model: Job | None = None
    is_seeded: bool = False

    @property
    def sources(self) -> list[Job]:
        """The jobs that come first."""
        return list(dict.fromkeys([*self.masks.values(), *([self.model] if self.model else [])]))

    def __hash__(self) -> int:
        return hash(self.name)
