"""The command line: overrides, shortcuts of settings, and arguments of the verbs themselves."""

from __future__ import annotations

import errno
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from traceback import StackSummary
from typing import Any

import pytest
from torch.distributed.checkpoint.api import CheckpointException

import megamask.__main__ as main_module
from megamask import file_kinds
from megamask.__main__ import main
from megamask.config.load import load_config, read_settings
from megamask.errors import EXIT_UNAVAILABLE, EXIT_USER_ERROR, ConfigError
from megamask.model.checkpoint import telling
from megamask.process.place import Place
from megamask.process.signals import StopRequest
from megamask.safe_checkpoint import unreadable
from megamask.storage import atomic_file, read_json
from megamask.verbs.own_arguments import (
    DiffArguments,
    ExtractArguments,
    InspectArguments,
    PlanArguments,
)
from megamask.verbs.words import build_arguments, parse


def test_words_are_overrides_arguments_and_a_recipe_in_any_order() -> None:
    request = parse(
        ["diff", "run_dir=runs/x", "wanda", "--json", "out.json", "a: b/m.safetensors"]
        + ["--picture=p.png", "--config", "recipe.yaml"]
    )
    assert (request.verb, request.recipe) == ("diff", "recipe.yaml")
    assert load_config(None, request.overrides).run_dir == "runs/x"
    assert build_arguments("diff", request.arguments) == DiffArguments(
        a="wanda", b="a: b/m.safetensors", json="out.json", picture="p.png"
    )


@pytest.mark.parametrize("word", ["1e3", "null", "true", "2:4", "a#b", "'q'", '"', "\\n", "ä"])
def test_an_argument_is_taken_to_the_letter(word: str) -> None:
    """Overrides are YAML; file names are not."""
    given = parse(["extract", "x", word]).arguments
    assert build_arguments("extract", given) == ExtractArguments(snapshot="x", file=word)


def test_a_path_may_hold_an_equals_sign() -> None:
    given = parse(["diff", "wanda", "runs/lr=3/m.safetensors", "seed=4"])
    assert given.arguments == {"a": "wanda", "b": "runs/lr=3/m.safetensors"}
    assert given.overrides == ["seed=4"]


def test_shortcuts_stand_for_settings_and_the_last_word_wins() -> None:
    request = parse(["plan", "--model", "llama2-7b", "--tp=8", "--gpu", "a100", "--gpu=h100"])
    assert load_config(None, request.overrides).parallel.tp == 8
    assert build_arguments("plan", request.arguments) == PlanArguments(
        model="llama2-7b", gpu="h100"
    )
    assert build_arguments("inspect", {}) == InspectArguments(mask=None)


def test_arguments_that_were_settings_are_still_read(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        old = read_settings(None, ["plan.model=llama2-7b", "plan.dp=2", "extract.out=f", "seed=1"])
    assert old[1] == {"plan": {"model": "llama2-7b", "dp": 2}, "extract": {"file": "f"}}
    assert build_arguments("plan", old[1]["plan"]) == PlanArguments(model="llama2-7b", dp=2)
    assert build_arguments("plan", {"dp": None, "model": "llama2-7b"}).dp == 1
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("plan", {"model": True}), ("plan", {"dp": True}), ("diff", {"a": True, "b": "x"}),
        ("reorder", {"out": "x", "rotate_values": "yes"}),
    ]  # fmt: skip
    for verb, given in wrong:
        with pytest.raises(ConfigError):
            build_arguments(verb, given)
    assert "plan.dp is --dp of megamask plan now" in caplog.text
    with pytest.raises(ConfigError, match=r"plan\.node = 3: an argument of megamask plan: --model"):
        read_settings(None, ["plan.node=3"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["diff", "a", "b", "c"],
            "argument = 'c': diff takes A B, and key.sub=value. Leave it out.",
        ),
        (
            ["diff", "a", "--jsn", "x"],
            "option = '--jsn': --config FILE, --dry-run, --help, or key.sub=value without dashes; "
            "diff also has --json, --picture",
        ),
        (
            ["extract", "a", "--json", "x"],
            "option = '--json': --config FILE, --dry-run, --help, or key.sub=value without dashes; "
            "extract also has --coding. "
            "Run megamask extract --help.",
        ),
        (["status", "--json=false"], "--json = 'false': takes no value. Write --json alone"),
        (["submit", "--dry-run="], "--dry-run = '': takes no value"),
        (["diff", "a", "--json"], "--json = '': needs a value"),
        (["learn", "--config"], "--config = '': needs a recipe file"),
        (["dif", "a", "b"], "Did you mean diff?"),
    ],
)
def test_a_wrong_word(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(words)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["diff"], "A = None: mask, named as learn.prior.mask. Write megamask diff A B."),
        (["extract", "a"], "FILE = None: mask file to write"),
        (["plan", "--dp", "0"], "--dp = '0': a whole number from 1 to 999,999"),
        (["plan", "--gpu", "h10"], "--gpu = 'h10': one of a100-40, a100, h100, h200, cpu. Did you"),
        (["learn", "wanda"], "wanda = 'wanda': an override has the form key.sub=value"),
    ],
)
def test_a_wrong_argument_is_one_line_and_ends_with_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_recipes_are_known_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of that name wins, and a folder does not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert load_config(Path("quickstart")).run_dir == "runs/quickstart"
    (tmp_path / "debug").write_text("run_dir: mine\n")
    assert load_config(Path("debug")).run_dir == "mine"
    assert main(["recipes", "debug"]) == 0
    assert capsys.readouterr().out.startswith("# A tiny random Llama")
    for words, said in (
        (
            ["recipes", "debugg"],
            "NAME = 'debugg': one of debug, domains, maskllm-llama2-7b, quickstart-gemma3, "
            "quickstart. Did",
        ),
        (["learn", "--config", "quickstrat"], "a file, or one of debug"),
        (["recipes", "debug.yaml"], "Did you mean debug?"),
        (["recipes", "a", "b"], "recipes takes NAME"),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err


def test_versions_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["megamask", "torch", "megatron-core", "python"]


def test_a_program_that_runs_several_verbs_keeps_its_logger() -> None:
    """A handler that stayed would repeat each message, to a stderr that may be closed by then."""
    logger = logging.getLogger("megamask")
    before = (list(logger.handlers), logger.level)
    for words, code in (
        (["recipes", "debug"], 0),
        (["recipes", "debugg"], 2),
        (["learn", "x=1"], 2),
    ):
        assert main(words) == code
        assert (logger.handlers, logger.level) == before


def test_trouble_that_may_pass_is_no_mistake_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A launcher starts again what ended with code 69, and gives up at code 2."""

    def codes(fail: Callable[[OSError], None]) -> dict[str, int]:
        found = {}
        for number in (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ENOSPC, errno.EACCES):

            def run(*_: object, number: int = number) -> int:
                fail(OSError(number, os.strerror(number), str(tmp_path / "x")))
                return 0

            monkeypatch.setattr(main_module, "_run_verb", run)
            found[errno.errorcode[number]] = main(["inspect"])
            assert capsys.readouterr().err.count("\n") == 1
        return found

    def write(error: OSError) -> None:
        with atomic_file(tmp_path / "x"):
            raise error

    def save(error: OSError) -> None:  # as Megatron's writer tells of its ranks
        with telling(tmp_path / "x", tmp_path / "y"):
            raise CheckpointException("write", {0: (error, StackSummary())})

    def load(error: OSError) -> None:
        raise unreadable(tmp_path / "x", error, "Delete it.") from error

    def read(error: OSError) -> None:
        def fail(*_: object, **__: object) -> None:
            raise error

        with monkeypatch.context() as failing:
            failing.setattr(Path, "is_file", fail)
            failing.setattr(file_kinds, "file_kind", fail)
            read_json(tmp_path / "x", "")

    passing = dict.fromkeys(("ESTALE", "EIO", "ETIMEDOUT"), EXIT_UNAVAILABLE)
    expected = {**passing, "ENOSPC": EXIT_USER_ERROR, "EACCES": EXIT_USER_ERROR}
    for fail in (write, save, load, read):
        assert codes(fail) == expected, fail


def test_a_signal_that_a_library_takes_for_its_own_error_stops_the_verb(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python 3.11 makes a RuntimeError of what is raised while a class gets its fields."""
    stop = StopRequest()

    def interrupted(*_: object) -> int:
        try:
            stop(signal.SIGINT, None)
        except BaseException as error:
            raise ConfigError("data.tokenizer", "x", "a folder", "Set it.") from error
        return 0

    monkeypatch.setattr(main_module, "_run_verb", interrupted)
    assert main_module._run(["prune"], stop) == 130
    assert "SIGINT: stopped" in capsys.readouterr().err
    monkeypatch.setattr(StopRequest, "__call__", lambda *_: raise_other())
    assert main_module._run(["prune"], StopRequest()) == 2  # without a signal: the error


@pytest.mark.parametrize(("verb", "code"), [("learn", 75), ("prune", 128 + signal.SIGUSR1)])
def test_a_signal_before_the_verb_is_told_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str, code: int
) -> None:
    """Handlers stand, and the part that tells of a signal has not begun: ``learn`` ended with 138
    and not a word.
    """

    def signalled() -> Place:
        os.kill(os.getpid(), signal.SIGUSR1)
        return Place()

    monkeypatch.setattr(main_module, "Place", signalled)
    assert main([verb]) == code
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("megamask: SIGUSR1: ")


def raise_other() -> None:
    raise RuntimeError("another error")
