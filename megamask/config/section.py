"""The parts of every section of the settings tree: base class, common ranges, free settings."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Above0 = Annotated[float, Field(gt=0)]
Below1 = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of the sections. A section refuses unknown keys and infinite values, and nothing can
    reassign a setting after it was read.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def free(default: Any = ..., **facts: Any) -> Any:
    """The ``Field`` of a free setting: its value decides no artefact's content, so it may change
    whenever a run is resumed. Every other setting decides the content of what is made with it.
    """
    return Field(default, json_schema_extra={"free": True}, **facts)


def is_free(section: type[BaseModel], name: str) -> bool:
    """Whether the setting ``name`` of ``section`` was declared with :func:`free`."""
    extra = section.model_fields[name].json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("free"))
