"""``~`` is a home folder in every path that a user gives, and an unknown user is one message."""

from __future__ import annotations

import pwd
from collections.abc import Callable
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import pytest

import megamask
from megamask.__main__ import main
from megamask.config import build_config, load_config
from megamask.config.deciding import changes
from megamask.config.describe import leaves
from megamask.config.nested import flatten, nest
from megamask.errors import EXIT_USER_ERROR, ArgumentError, ArtifactError, ConfigError
from megamask.verbs.argument_field import words_of
from megamask.verbs.own_arguments import ReportArguments
from megamask.verbs.table import VERBS

UNKNOWN = "~nobody-of-this-name/x"
PATHS = """
    run_dir model.hf model.gguf model.megatron model.sensitivity data.tokenizer
    evaluate.text learn.prior.mask tasks.include tasks.folder
    export.mask export.weights export.out sensitivity.mask recover.mask recover.out speed.folder
    launch.container
"""
NO_PATHS = """
    pattern data.eod learn.method learn.optimizer.kind learn.monitor.wandb_project
    launch.time launch.account launch.partition launch.qos launch.setup
    model.include model.exclude model.exclude_sensitive model.ignore_keys tasks.names launch.sbatch
    pattern_overrides
"""
NESTED: dict[str, Callable[[str], Any]] = {  # setting -> a value with a path in it
    "data.domains": lambda path: {"a": {"kind": "text", "path": path}},
    "evaluate.masks": lambda path: {"row": path},
    "launch.mounts": lambda path: [f"{path}:/inside"],
}
NO_PATHS_OF_VERBS = {"gpu", "coding", "repo", "what", "base_name", "prefix", "name", "verb"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_every_setting_that_is_a_text_is_known_as_a_path_or_not() -> None:
    """A new setting of a path belongs into ``PATHS``, and its type is ``UserPath``."""
    texts = {one.key for one in leaves() if "text" in one.allowed.replace(":", " ").split()}
    assert texts - {*NO_PATHS.split(), *NESTED} == {*PATHS.split()}


@pytest.mark.parametrize("key", [*PATHS.split(), *NESTED])
def test_settings(key: str, home: Path) -> None:
    value = NESTED.get(key, str)

    def read(path: str) -> str:
        config = build_config(nest({key: value(path)}))
        flat = flatten(config.model_dump(mode="json"))
        return str([one for name, one in flat.items() if name.startswith(key)])

    assert str(home / "x") in read("~/x")
    for literal in ("./~/x", "a/~/x"):
        assert f"'{literal}" in read(literal)
    with pytest.raises(ConfigError, match=rf"^{key}.* = '~nobody-of-this-name.* Write the home"):
        read(UNKNOWN)


ARGUMENTS = [
    (name, one.name)
    for name, verb in VERBS.items()
    for one in verb.fields
    if one.metadata["kind"] is str and one.name not in NO_PATHS_OF_VERBS
]


@pytest.mark.parametrize(("verb", "argument"), ARGUMENTS)
def test_arguments_of_verbs(verb: str, argument: str, home: Path) -> None:
    required = {one.name: "x" for one in VERBS[verb].fields if one.default is MISSING}
    (field,) = (one for one in VERBS[verb].fields if one.name == argument)

    def read(path: str) -> Any:
        given = (path,) if field.metadata["many"] else path
        arguments: Any = VERBS[verb].arguments
        found = getattr(arguments(**{**required, argument: given}), argument)
        return found[0] if field.metadata["many"] else found

    assert [read("~/x"), read("./~/x")] == [str(home / "x"), "./~/x"]
    flag = words_of(field).split()[0]
    with pytest.raises(ConfigError, match=rf"^{flag} = '~nobody-of-this-name/x'.* Write the home"):
        read(UNKNOWN)


def test_a_recipe_and_a_comparison_lie_in_the_home(home: Path) -> None:
    home.mkdir()
    (home / "r.yaml").write_text("run_dir: ~/runs/a\n")
    assert load_config("~/r.yaml").run_dir == str(home / "runs/a")
    assert load_config(None, ["export.out=~/e"]).export.out == str(home / "e")
    assert ReportArguments(out="~/c.html").comparison == home / "c.html"
    with pytest.raises(ConfigError, match=r"^--config = '~nobody"):
        load_config(UNKNOWN)


@pytest.mark.parametrize(
    "words",
    [
        ("status", UNKNOWN),
        ("inspect", f"--config={UNKNOWN}"),
        ("convert", f"model.hf={UNKNOWN}"),
        ("tokenize", f"data.domains.a={{kind: text, path: {UNKNOWN}}}"),
        ("evaluate", f"data.tokenizer={UNKNOWN}"),
    ],
)
def test_an_unknown_user_is_one_message(
    words: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*words]) == EXIT_USER_ERROR
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and "Write the home folder itself" in said[0], said


def test_a_user_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container the number of the user may have no name."""

    def nobody(number: int) -> None:
        raise KeyError(number)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(ConfigError, match=r"^model\.hf = '~/x'"):
        load_config(None, ["model.hf=~/x"])


def test_public_functions(home: Path) -> None:
    with pytest.raises(ArtifactError, match=str(home / "m.safetensors")):
        megamask.load_masks("~/m.safetensors")
    with pytest.raises(ArgumentError, match="load_masks: path is .*Write the home folder"):
        megamask.load_masks(UNKNOWN)
    with pytest.raises(ArtifactError, match=r"^~/m"):  # a path object says what it means
        megamask.load_masks(Path("~/m.safetensors"))


def test_notes_of_before_name_the_same_places(home: Path) -> None:
    """Shards and snapshots of an older version have the words of the recipe."""
    now = build_config({"data": {"domains": {"a": {"kind": "text", "path": "~/c"}}}})
    before = {"model.hf": "~/hf", "data.domains.a.path": "~/c", "data.domains.a.kind": "text"}
    config = now.model_copy(update={"model": {"hf": str(home / "hf")}})
    sections = ("model.hf", "data.domains")
    assert not [key for key in changes(before, config, sections) if key in before]
    unknown = changes({**before, "model.hf": UNKNOWN}, config, sections)
    assert unknown["model.hf"][0] == UNKNOWN
