"""The parts of every section of the settings tree: base class, common ranges, roles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)
from pydantic_core import PydanticCustomError, PydanticUndefined

from megamask import user_paths
from megamask.file_kinds import USABLE, can_be_a_path
from megamask.user_paths import with_home

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


def one_error(kind: Literal["int_type", "float_type"]) -> WrapValidator:
    """A check of a union of types with one error, of pydantic's ``kind``, to which the loader adds
    the range: pydantic reports an error for each of the types, and takes true for 1.
    """

    def checked(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            if not isinstance(value, bool):
                return check(value)
        except ValidationError:
            pass
        raise PydanticCustomError(kind, "a value of another type is needed")

    return WrapValidator(checked)


AnySection = TypeVar("AnySection", bound="Section")


class Section(BaseModel):
    """Base of the sections. A section refuses unknown keys and infinite values, and nothing can
    reassign a setting after it was read.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_unusable_text(cls, value: Any) -> Any:
        """Refuse text that no path, command or variable can hold."""
        given = value if isinstance(value, list | tuple | Mapping) else [value]
        if not all(can_be_a_path(one) for one in given if isinstance(one, str)):
            raise ValueError(USABLE)
        return value

    def model_copy(
        self: AnySection, *, update: Mapping[str, Any] | None = None, deep: bool = False
    ) -> AnySection:
        """A copy with other values, checked as given values are: pydantic itself takes whatever
        ``update`` holds.

        Args:
            update: setting or section -> value.
            deep: has no meaning here, because nothing changes a section.

        Raises:
            ValidationError: a name that does not exist, or a value out of range.
        """
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self).model_validate({**given, **(update or {})})


def _with_home(text: str) -> str:
    found = with_home(text)
    if found is None:
        raise PydanticCustomError(UNKNOWN_USER, user_paths.ALLOWED)
    return found


UNKNOWN_USER = "unknown_user"  # kind of error, to which the loader adds the fix
HOME = AfterValidator(_with_home)
UserPath = Annotated[str, HOME]  # a path, or a text that may be one, such as the name of a mask

# The role of a setting says what a change of it means for what was made with the former value.
Role = Literal["decides", "each step", "content", "free"]


def free(default: Any = PydanticUndefined, **facts: Any) -> Any:
    """The ``Field`` of a free setting: its value decides no artefact's content, so it may change
    whenever a run is resumed. Every other setting decides the content of what is made with it.
    """
    return Field(default, json_schema_extra={"role": "free"}, **facts)


def each_step(default: Any = PydanticUndefined, **facts: Any) -> Any:
    """The ``Field`` of a setting that every learning step reads anew. A resumed run may change it
    from there on: nothing that was made before stands on the new value. The change is recorded.
    """
    return Field(default, json_schema_extra={"role": "each step"}, **facts)


def by_content(default: Any = PydanticUndefined, **facts: Any) -> Any:
    """The ``Field`` of a path whose content decides: artefacts keep a digest of the content, and
    the path may change.
    """
    return Field(default, json_schema_extra={"role": "content"}, **facts)


def role_of(section: type[BaseModel], name: str) -> Role:
    """The role of the setting ``name`` of ``section``: ``decides`` unless its field says more."""
    extra = section.model_fields[name].json_schema_extra
    role: Role = extra.get("role", "decides") if isinstance(extra, dict) else "decides"  # type: ignore[assignment]
    return role
