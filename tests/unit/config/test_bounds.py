"""Every number of the settings has a first and a last value, and refuses others in one message."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from annotated_types import Ge, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megamask.config import build_config
from megamask.config.nested import nest
from megamask.config.tree import Config, CorpusSection
from megamask.errors import ConfigError, MegamaskError
from megamask.verbs.own_arguments import PlanArguments
from megamask.verbs.plan import run as plan
from tests.conftest import IS_NIGHTLY

ODD: list[Any] = [
    math.nan, math.inf, -math.inf, 1e308, -1e308, 2**63, -(2**63) - 1, 10**30, 10**5000, "1e400",
    "-1e400", "nan", "x", "", None, [], {},
]  # fmt: skip
PLANS = 400 if IS_NIGHTLY else 130


class Number:
    """A numeric setting and its limits.

    Attributes:
        key: dotted; of a pair, the setting.
        kind: int or float.
        first, last: the limits; None where there is none.
    """

    def __init__(
        self, key: str, kind: type, limits: list[Any], pair: tuple[Any, ...] = (), place: int = 0
    ) -> None:
        self.key, self.kind, self._pair, self._place = key, kind, pair, place
        self.first: Any = next((one.ge for one in limits if isinstance(one, Ge)), None)
        self.last: Any = next((one.le if isinstance(one, Le) else one.lt
                          for one in limits if isinstance(one, Le | Lt)), None)  # fmt: skip

    def values(self, number: Any) -> dict[str, Any]:
        """Nested settings with the number in its place, beside the default in a pair."""
        if self._pair:
            number = [*self._pair[: self._place], number, *self._pair[self._place + 1 :]]
        tree = nest({self.key: number})
        if "domains" in tree.get("data", {}):
            tree["data"]["domains"]["web"]["kind"] = "stdlib"
        return tree

    def __repr__(self) -> str:
        return self.key


def limits_of(field: FieldInfo, annotation: Any) -> tuple[Any, list[Any]]:
    """The type within ``Annotated`` and optional wrappers, and every limit on the way."""
    limits = list(field.metadata)
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *facts = get_args(annotation)
            limits += [m for one in facts for m in getattr(one, "metadata", [])]
        elif type(None) in get_args(annotation):
            (annotation,) = (one for one in get_args(annotation) if one is not type(None))
        else:
            return annotation, limits


def numbers(section: type[BaseModel], prefix: str = "") -> Iterator[Number]:
    """Every number of a section and of the sections below it."""
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        kind, limits = limits_of(field, field.annotation)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from numbers(kind, f"{key}.")
        elif get_origin(kind) is tuple:
            inners = get_args(kind)
            pair = field.default or (0.5,) * len(inners)  # null is allowed where it is the default
            for place, inner in enumerate(inners):
                yield Number(key, *limits_of(field, inner), pair, place)
        elif get_origin(kind) is dict:
            inner, facts = limits_of(field, get_args(kind)[1])
            if inner in (int, float):
                yield Number(f"{key}.web", inner, facts)
        elif kind in (int, float):
            yield Number(key, kind, limits)


NUMBERS = [*numbers(Config), *numbers(CorpusSection, "data.domains.web.")]


def test_all_numbers_are_found() -> None:
    keys = {number.key for number in NUMBERS}
    assert len(keys) > 40
    assert {"seed", "learn.sampling.tau", "data.blend.web", "data.domains.web.heldout"} <= keys


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_a_number_has_a_first_and_a_last_value(number: Number) -> None:
    assert number.first is not None and math.isfinite(number.first), "no lower limit"
    assert number.last is not None and math.isfinite(number.last), "no upper limit"
    assert number.last <= 10**15
    for value in (number.first, number.last):
        try:
            build_config(number.values(number.kind(value)))
        except ConfigError as error:  # an open end, or all samples of the run together
            assert value == number.last == 1 or "samples in all" in error.allowed, error
    beyond = [number.first - 1, number.last * 1.5]
    for value in (*beyond, *ODD):
        if value is None and default_is_none(number):
            continue
        with pytest.raises(ConfigError) as refused:
            build_config(number.values(value))
        assert refused.value.key == number.key and len(str(refused.value)) < 800
        if isinstance(value, int | float):
            assert " to " in refused.value.allowed or "domains" in number.key


def default_is_none(number: Number) -> bool:
    try:
        build_config(number.values(None))
    except ConfigError:
        return False
    return True


def test_a_number_without_limits_would_show() -> None:
    class Section(BaseModel):
        steps: int = 1
        rates: tuple[float, Annotated[float, Ge(0)]] = (1.0, 1.0)

    assert all(number.last is None for number in numbers(Section))
    assert len(list(numbers(Section))) == 3


def choices(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every setting that is one of some words, with them."""
    for name, field in section.model_fields.items():
        kind, _ = limits_of(field, field.annotation)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from choices(kind, f"{prefix}{name}.")
        elif get_origin(kind) is Literal or kind is bool:
            yield f"{prefix}{name}", (True, False) if kind is bool else get_args(kind)


def legal(number: Number, choose: random.Random) -> Any:
    """A value within the limits: an end, or one of any magnitude between them."""
    first, last = max(float(number.first), 1e-12), float(number.last)
    value = math.exp(choose.uniform(math.log(first), math.log(last)))
    value = choose.choice([float(number.first), last, value, value, value])
    return number.kind(value)


def test_legal_settings_are_planned_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever legal values stand side by side, ``plan`` predicts a run or names what is wrong."""
    words, outcomes = list(choices(Config)), {"planned": 0, "refused": 0}
    for seed in range(PLANS):
        choose = random.Random(seed)
        flat = {key: choose.choice(values) for key, values in choose.sample(words, 6)}
        values: dict[str, Any] = nest(flat)
        for number in choose.sample(NUMBERS, choose.choice([2, 6, 20])):
            merge_into(values, number.values(legal(number, choose)))
        values["pattern"] = choose.choice(["2:4", "1:4", "4:8", "1:2", "7:8"])
        values.setdefault("learn", {})["method"] = choose.choice(
            ["subset", "categorical", "maskpro"]
        )
        try:
            plan(build_config(values), PlanArguments(model="llama3-8b", dp=choose.choice([1, 8])))
            outcomes["planned"] += 1
        except MegamaskError:
            outcomes["refused"] += 1
        except Exception as error:  # what this test is about
            raise AssertionError(f"seed {seed}: {values}: {error!r}") from error
        said = capsys.readouterr().out
        assert "nan" not in said.lower().split() and "inf" not in said.lower().split(), said
    assert min(outcomes.values()) > PLANS // 20, outcomes


def merge_into(below: dict[str, Any], above: dict[str, Any]) -> None:
    from megamask.config.nested import merge

    merge(below, above)
