"""Settings from Python: named settings apply or are refused, and a wrong type is one error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from megamask.config import Config, build_config, load_config
from megamask.config.learn_tree import LearnSection, SamplingSection
from megamask.errors import ArgumentError, ConfigError, MegamaskError
from megamask.verbs.words import build_arguments

MASKLLM = {"preset": "maskllm", "memory": "lean"}
WAYS: dict[str, Callable[[], Config]] = {
    "build_config": lambda: build_config({"learn": MASKLLM}),
    "old words": lambda: build_config({"learn": {"preset": "maskllm", "footprint": "lean"}}),
    "Config of a mapping": lambda: Config.model_validate({"learn": MASKLLM}),
    "Config of a section": lambda: Config(learn=LearnSection(preset="maskllm", memory="lean")),
    "copy with a section": lambda: Config().model_copy(
        update={"learn": LearnSection(preset="maskllm", memory="lean")}
    ),
    "copy with a mapping": lambda: Config().model_copy(update={"learn": MASKLLM}),
    "section copied": lambda: Config(learn=Config().learn.model_copy(update=MASKLLM)),
    "JSON": lambda: Config.model_validate_json(
        '{"learn": {"preset": "maskllm", "memory": "lean"}}'
    ),
    "overrides": lambda: load_config(None, ["learn.preset=maskllm", "learn.memory=lean"]),
    "copied twice": lambda: (
        build_config({"learn": MASKLLM})
        .model_copy(update={"seed": 1})
        .model_copy(update={"seed": 1234})
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_named_settings_apply_however_they_are_given(way: str) -> None:
    learn = WAYS[way]().learn
    assert (learn.method, learn.global_batch, learn.state.logits) == ("categorical", 256, "bf16")
    assert learn == build_config({"learn": MASKLLM}).learn != LearnSection()


@pytest.mark.parametrize("name", ["preset", "memory", "method"])
def test_a_copy_of_a_section_does_not_keep_what_another_name_stood_for(name: str) -> None:
    section = build_config({"learn": {**MASKLLM, "method": "maskpro"}}).learn
    value = {"preset": "best", "memory": "default", "method": "subset"}[name]
    with pytest.raises(ConfigError, match=rf"learn\.{name} = '{value}'.*build_config"):
        section.model_copy(update={name: value})
    same = section.model_copy(update={name: getattr(section, name), "steps": 7})
    assert same.steps == 7 and Config(learn=same).learn.steps == 7


@pytest.mark.parametrize(("name", "former"), [("method", "subset"), ("preset", "best")])
def test_a_name_that_stands_for_no_settings_is_replaced_in_a_copy(name: str, former: str) -> None:
    section = build_config({"learn": {name: former, "steps": 7}}).learn
    now = {"method": "categorical", "preset": "maskllm"}[name]
    copied = Config(learn=section.model_copy(update={name: now})).learn
    assert copied == build_config({"learn": {name: now, "steps": 7}}).learn


def test_a_copy_is_checked_and_keeps_what_was_given() -> None:
    section = SamplingSection(mode="hard").model_copy(update={"tau": (2.0, 1.0)})
    assert (section.mode, section.tau) == ("hard", (2.0, 1.0))
    for update in ({"taw": 1}, {"tau": (-1, 1)}, {"mode": None}):
        with pytest.raises(ValidationError):
            section.model_copy(update=update)
    # a value that was given still wins over a preset
    config = Config().model_copy(update={"learn": {"preset": "maskllm", "global_batch": 8}})
    assert config.learn.global_batch == 8 and config.learn.method == "categorical"


ODD: list[Any] = [
    3,
    2.5,
    b"x",
    "",
    "learn",
    "\0",
    [],
    [1],
    {1: 2},
    {"learn": 3},
    b"bytes",
    Path,
    None,
]


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_wrong_types_are_one_error(value: Any) -> None:
    calls: list[Callable[[], object]] = [
        lambda: build_config(value),
        lambda: build_config({"learn": value}),
        lambda: build_config({"learn": {"steps": value}}),
        lambda: load_config(value),
        lambda: load_config(None, value),
        lambda: load_config(None, [value]),
    ]
    for call in calls:
        try:
            call()
        except MegamaskError as error:
            assert str(error).isprintable()


def test_a_recipe_may_be_text() -> None:
    assert load_config("quickstart") == load_config(Path("quickstart"))
    with pytest.raises(ArgumentError, match=r'a list of words is needed, as \["learn.steps=100"\]'):
        load_config(None, "learn.steps=100")


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
def test_text_that_no_path_can_hold_is_refused_everywhere(text: str) -> None:
    for given in (
        {"run_dir": text},
        {"export": {"out": text}},
        {"launch": {"sbatch": ["-x", text]}},
        {"data": {"domains": {text: {"kind": "stdlib"}}}},
    ):
        with pytest.raises(ConfigError, match="without NUL"):
            build_config(given)
    assert build_config({"run_dir": "a\udce9 \n"}).run_dir == "a\udce9 \n"  # bytes of a path
    with pytest.raises(ConfigError, match="^RUN = .*without NUL"):
        build_arguments("status", {"run": text})
