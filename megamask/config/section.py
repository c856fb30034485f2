"""The parts of every section of the settings tree: base class, common ranges, free settings."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticUndefined

# Every number has a first and a last value. The limits lie far beyond use, and below what overflows
# in 32-bit arithmetic, in an index of samples or in an allocation.
Batch = Annotated[int, Field(ge=1, le=2**20)]  # samples, windows, masks
Tokens = Annotated[int, Field(ge=1, le=2**20)]  # of a sample or window
Samples = Annotated[int, Field(ge=1, le=10**7)]  # of a whole set
Steps = Annotated[int, Field(ge=1, le=10**7)]
Ranks = Annotated[int, Field(ge=1, le=2**16)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # numpy's generators take 32 bits
Share = Annotated[float, Field(ge=0, le=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Coefficient = Annotated[float, Field(ge=0, le=1e6)]
Positive = Annotated[float, Field(ge=1e-9, le=1e6)]
Rate = Annotated[float, Field(ge=1e-12, le=1e6)]


class Section(BaseModel):
    """Base of the sections. A section refuses unknown keys and infinite values, and nothing can
    reassign a setting after it was read.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def free(default: Any = PydanticUndefined, **facts: Any) -> Any:
    """The ``Field`` of a free setting: its value decides no artefact's content, so it may change
    whenever a run is resumed. Every other setting decides the content of what is made with it.
    """
    return Field(default, json_schema_extra={"free": True}, **facts)


def is_free(section: type[BaseModel], name: str) -> bool:
    """Whether the setting ``name`` of ``section`` was declared with :func:`free`."""
    extra = section.model_fields[name].json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("free"))
