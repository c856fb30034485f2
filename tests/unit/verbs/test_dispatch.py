"""Every verb of the table: who runs it, and what it holds while it runs."""

from __future__ import annotations

import ast
import inspect
import os
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

import pytest

from megamask.__main__ import main
from megamask.config.load import load_config
from megamask.errors import EXIT_OK, EXIT_USER_ERROR
from megamask.process import lock as lock_file
from megamask.process.lock import locked
from megamask.verbs.dispatch import artefacts, in_run
from megamask.verbs.table import VERBS
from megamask.verbs.words import build_arguments, parse

# The words that make a verb write a file of its own.
WORDS = {
    "plan": ["--model", "llama2-7b", "--json", "{}/plan.json"],
    "diff": ["wanda", "magnitude", "--json", "{}/d.json", "--picture", "{}/d.png"],
    "extract": ["learned", "{}/mask.safetensors"],
    "reorder": ["{}/reordered"],
    "import": ["masks.npz", "{}/mask.safetensors"],
    "push": ["owner/name", "--dry-run"],
}
WRITERS = [name for name, verb in VERBS.items() if verb.writes]


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal comes at once, and not after a second in which the holder might have ended."""
    monkeypatch.setattr(lock_file, "PATIENCE", 0.0)


def words(name: str, run_dir: Path) -> list[str]:
    return [name, f"run_dir={run_dir}", *(word.format(run_dir) for word in WORDS.get(name, []))]


def paths_of(name: str, run_dir: Path, kind: str) -> list[Path]:
    request = parse(words(name, run_dir))
    arguments = [build_arguments(name, request.arguments)] if VERBS[name].fields else []
    names = VERBS[name].writes if kind == "writes" else VERBS[name].reads
    return artefacts(names, load_config(None, request.overrides), arguments)


def test_a_page_is_held_where_it_is_written(tmp_path: Path) -> None:
    """The report of a run in the folder of that run, the page of a comparison in its own."""
    for given, page in (([], "report.html"), (["a"], "a/report.html"), (["a", "b"], "c.html")):
        out = ["--out", f"{tmp_path}/c.html"] if len(given) > 1 else []
        places = [f"{tmp_path}/{name}" for name in given]
        request = parse(["report", f"run_dir={tmp_path}", *places, *out])
        arguments = [build_arguments("report", request.arguments)]
        config = in_run(load_config(None, request.overrides), arguments)
        assert tmp_path / page in artefacts(VERBS["report"].writes, config, arguments)
    comparison = build_arguments("report", {"runs": ["x", "y"]}).comparison
    assert comparison == Path("comparison.html")  # in the current folder


def test_verbs_that_write_nothing_are_few() -> None:
    assert set(VERBS) - set(WRITERS) <= {"inspect", "settings", "recipes", "status", "stop"}


@pytest.mark.parametrize("name", WRITERS)
def test_a_second_start_is_refused_by_name(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for path in paths_of(name, run_dir, "writes"):
        with locked("megamask another", [path]):
            assert main(words(name, run_dir)) == EXIT_USER_ERROR
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1, said
        holder = f"is being written by megamask another (process {os.getpid()} on"
        assert said[0].startswith(f"megamask: error: {path}: {holder}"), said
    assert list(run_dir.iterdir()) == []  # the refused verb left nothing, its own locks included


@pytest.mark.parametrize("name", [name for name, verb in VERBS.items() if verb.reads])
def test_an_input_that_is_replaced_is_not_read(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in paths_of(name, tmp_path, "reads"):
        with locked("megamask another", [path]):
            assert main(words(name, tmp_path)) == EXIT_USER_ERROR
        assert f"{path}: is being written by" in capsys.readouterr().err


def test_whoever_reads_keeps_writers_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as stack:
        for name in ("learn", "evaluate"):
            stack.enter_context(locked(f"megamask {name}", [], paths_of(name, tmp_path, "reads")))
        for name in ("convert", "tokenize"):
            assert main(words(name, tmp_path)) == EXIT_USER_ERROR
            assert "is being read by megamask learn" in capsys.readouterr().err


def test_a_model_outside_the_run_folder_gets_no_lock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    with locked("megamask another", [tmp_path / "model"]):
        main([*words("convert", tmp_path / "run"), f"model.hf={tmp_path / 'model'}"])
    assert "config.json" in capsys.readouterr().err  # the model is empty, not held


@pytest.mark.parametrize("name", [name for name, verb in VERBS.items() if not verb.is_parallel])
def test_the_other_ranks_leave_the_work_to_rank_0(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for key, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(key, value)
    file = str(tmp_path / "m.safetensors")
    own = {"diff": ["learned", "wanda"], "push": ["owner/name"]}
    own |= dict.fromkeys(("extract", "import"), ["learned", file])
    given = own.get(name, [])
    assert main([name, f"run_dir={tmp_path / 'run'}", *given]) == EXIT_OK
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


@pytest.mark.parametrize("name", [name for name, verb in VERBS.items() if verb.is_parallel])
def test_ranks_that_work_together_compare_their_inputs_first(name: str) -> None:
    """Each rank reads the files by itself, and a network file system may show one an older file;
    tests/e2e/test_ranks.py shows what happens.
    """
    (start,) = (
        one
        for one in ast.walk(ast.parse(inspect.getsource(import_module(VERBS[name].module))))
        if isinstance(one, ast.With) and "start(config" in ast.unparse(one.items[-1].context_expr)
    )
    lines = [ast.unparse(line) for line in start.body]
    compares = [line.startswith("mesh.require_same('inputs'") for line in lines]
    assert any(compares), f"{name} starts ranks that may have read other files"
    before = "".join(lines[: compares.index(True)])
    assert "load" not in before and "build_model" not in before, "a model is made before"


@pytest.mark.parametrize(
    ("verb", "key"),
    [
        ("learn", "data.seq_length"),
        ("learn", "evaluate.window"),
        ("prune", "calibration.seq_length"),
        ("evaluate", "evaluate.window"),
        ("plan", "data.seq_length"),
    ],
)
def test_a_sequence_that_ranks_cannot_divide_is_refused_before_anything_is_read(
    verb: str,
    key: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run folder is empty: a verb that looked for weights first would miss them."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    layout = ["parallel.tp=2", "parallel.sequence_parallel=true"]
    text = ["data.domains.a={kind: text, path: x}", f"{key}=33"]
    given = ["--model", "llama2-7b"] if verb == "plan" else []
    assert main([verb, *given, f"run_dir={tmp_path}", *layout, *text]) == EXIT_USER_ERROR
    assert f"{key} = 33: a multiple of parallel.tp=2" in capsys.readouterr().err
