"""Tokenizing in several processes, and going on after a kill: the bytes of the shards are those of
one process that was left alone.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks import tokenizing
from megamask.config import Config, run_paths
from megamask.data import split, write_shards
from megamask.data.encoders import Tokens, encoded
from megamask.data.token_files import PROGRESS, TokenFiles
from megamask.data.tokenizer import load_tokenizer
from megamask.verbs import tokenize
from tests.fork_server import ROOT, Child, child_environment, fork_server
from tests.unit.data.conftest import make_document, write_jsonl
from tests.unit.data.test_encoders import PLAIN, Texts

FILES = 4


class StoppedError(Exception):
    """The test ends a run."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of a few documents, and a note at the end of every file."""
    shrink(monkeypatch.setattr)


def shrink(set_value: Callable[[Any, str, Any], None]) -> None:
    set_value(write_shards, "BATCH_CHARACTERS", 1500)
    set_value(write_shards, "NOTE_EVERY", 0)


def domain(folder: Path, counts: list[int], first: int = 0, **more: Any) -> dict[str, Any]:
    """Settings of a domain of files with so many documents each."""
    folder.mkdir(exist_ok=True)
    for number, count in enumerate(counts):
        texts = [make_document(first + 100 * number + one) for one in range(count)]
        write_jsonl(folder / f"{number}.jsonl", texts)
    return {"kind": "jsonl", "path": str(folder), **more}


def shards(config: Config) -> dict[str, bytes]:
    """File -> content of all domains."""
    folder = run_paths(config).shards
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def config(tmp_path: Path, make_config: Callable[..., Config]) -> Callable[..., Config]:
    """Settings of a domain of ``FILES`` files; ``run`` names the folder of the run."""
    domains = {"a": domain(tmp_path / "text", [12] * FILES, heldout=0.2)}

    def make(run: str, **more: Any) -> Config:
        found = make_config(domains, **more)
        return found.model_copy(update={"run_dir": str(tmp_path / run)})

    return make


def test_the_number_of_processes_changes_no_byte(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    found = {}
    for processes in (1, 3):
        one = config(f"run{processes}", processes=processes)
        tokenize.run(one)
        found[processes] = shards(one)
    assert found[1] == found[3]
    assert sorted(found[1]) == [
        "a/heldout.bin", "a/heldout.idx", "a/meta.json", "a/train.bin", "a/train.idx",
    ]  # fmt: skip


def test_the_files_are_those_of_megatrons_builder(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    one = config("run", processes=2)
    tokenize.run(one)
    tokenizer = load_tokenizer(one)
    for side in ("train", "heldout"):
        builder = IndexedDatasetBuilder(str(tmp_path / "plain.bin"), dtype=np.uint16)
        for number in range(FILES):
            for document in range(12):
                text = make_document(100 * number + document)
                if (split.unit_hash(text) < 0.2) == (side == "heldout"):
                    ids = [*tokenizer.encode(text), tokenizer.eod]
                    builder.add_document(ids, [len(ids)])
        builder.finalize(str(tmp_path / "plain.idx"))
        for suffix in (".bin", ".idx"):
            written = run_paths(one).shards / "a" / f"{side}{suffix}"
            assert written.read_bytes() == (tmp_path / f"plain{suffix}").read_bytes()


def started(function: str, *arguments: Any) -> Child:
    """A function of this file in a process of its own."""
    environment = child_environment()
    with open(os.devnull, "w") as nowhere:
        return fork_server(environment).call(
            f"tests.unit.data.test_token_processes:{function}",
            *arguments,
            stdout=nowhere,
            stderr=nowhere,
            environment=environment,
            cwd=ROOT,
        )


def killed_run(settings: dict[str, Any], moment: int) -> int:
    """Run the verb in a process that kills itself when it has written ``moment`` batches."""
    from megamask.config import build_config

    shrink(setattr)
    add, batches = write_shards._add, iter(range(1, 10**6))

    def watched(*arguments: Any) -> None:
        add(*arguments)
        if next(batches) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(write_shards, "_add", watched)  # noqa: B010 - mypy takes functions for constants
    tokenize.run(build_config(settings))
    return 0


@pytest.mark.slow
def test_a_killed_run_goes_on_at_the_file_that_it_had_reached(
    config: Callable[..., Config], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    whole = config("whole", processes=1)
    tokenize.run(whole)
    one = config("run", processes=2)
    for moment in (2, 9):  # in the first file, and in a later file
        child = started("killed_run", json.loads(one.model_dump_json()), moment)
        assert child.wait(60) == -signal.SIGKILL
        assert not (run_paths(one).shards / "a").exists()
    capsys.readouterr()
    tokenize.run(one)
    said = [line for line in capsys.readouterr().err.splitlines() if "goes on after" in line]
    assert len(said) == 1
    assert shards(one) == shards(whole)


def stop_after(monkeypatch: pytest.MonkeyPatch, notes: int) -> None:
    """Let a run fail when it has noted the end of so many files."""
    note, seen = TokenFiles.note, iter(range(1, 10**6))

    def watched(self: TokenFiles, *arguments: Any) -> None:
        note(self, *arguments)
        if next(seen) == notes:
            raise StoppedError

    monkeypatch.setattr(TokenFiles, "note", watched)


def cases() -> Iterator[tuple[int, list[int], dict[str, Any]]]:
    choose = random.Random(0)
    for seed in range(12):
        counts = [choose.choice([0, 1, 1, 2, 5]) for _ in range(choose.randint(2, 5))] + [1, 1]
        share = choose.choice([0.0, 0.02, 0.3, 0.98])
        limit = choose.choice([None, None, 2000])
        yield seed, counts, {"heldout": share, "max_bytes": limit}


def interrupted(config: Config, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, bytes], int]:
    """Shards of a run that was stopped after every note in turn, and how often it was stopped."""
    stops = 0
    while True:
        with monkeypatch.context() as patch:
            stop_after(patch, 1)
            try:
                tokenize.run(config)
                return shards(config), stops
            except StoppedError:
                stops += 1


def test_a_stop_at_the_end_of_any_file_changes_no_byte(
    tmp_path: Path, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few documents, none in some files: the split may still wait for one when a file ends."""
    stops, differing = [], 0
    for seed, counts, more in cases():
        domains = {"a": domain(tmp_path / f"text{seed}", counts, first=1000 * seed, **more)}
        whole, parts, wrong = (
            make_config(domains, processes=1).model_copy(
                update={"run_dir": str(tmp_path / f"{name}{seed}")}
            )
            for name in ("whole", "parts", "wrong")
        )
        tokenize.run(whole)
        found, count = interrupted(parts, monkeypatch)
        assert found == shards(whole), (seed, counts, more)
        stops.append(count)
        with monkeypatch.context() as patch:  # a note that does not ask whether a document waits
            patch.setattr(write_shards, "split_documents", always_settled)
            differing += interrupted(wrong, patch)[0] != shards(whole)
    assert sum(stops) >= 10 and differing


def always_settled(documents: Any, share: float, state: split.SplitState) -> Iterator[Any]:
    """A split that says too early that no document waits for its side."""
    true = split.SplitState(state.settled)
    for pair in split.split_documents(documents, share, true):
        state.settled = True
        yield pair


def test_a_folder_of_other_settings_or_with_torn_files_is_begun_anew(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    whole = config("whole", processes=1)
    tokenize.run(whole)
    one = config("run", processes=1)
    partial = run_paths(one).shards / ".a.partial"
    for change in ("other settings", "torn tokens", "torn progress", "nothing"):
        with monkeypatch.context() as patch, pytest.raises(StoppedError):
            stop_after(patch, 2)
            tokenize.run(config("run", processes=1, eod=None) if "other" in change else one)
        if change == "torn tokens":
            os.truncate(partial / "train.bin", 100)
        if change == "torn progress":
            (partial / PROGRESS).write_text('{"files": ')
        capsys.readouterr()
        tokenize.run(one)
        assert ("goes on after" in capsys.readouterr().err) == (change == "nothing"), change
        assert shards(one) == shards(whole), change
        for file in (run_paths(one).shards / "a").iterdir():
            file.unlink()


def test_what_no_domain_goes_on_with_is_deleted(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = config("run", processes=1)
    left = run_paths(one).shards / ".gone.partial"
    left.mkdir(parents=True)
    tokenize.run(one)
    assert not left.exists()


def endless_run(folder: str) -> int:
    def encode(texts: Any) -> Tokens:
        (Path(folder) / str(os.getpid())).touch()
        time.sleep(60)
        return PLAIN(texts)

    list(encoded(encode, [Texts("a"), Texts("b"), Texts("c")], 2, "web"))
    return 0


@pytest.mark.slow
def test_no_process_outlives_the_process_that_started_it(tmp_path: Path) -> None:
    child = started("endless_run", str(tmp_path))
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait(30) == -signal.SIGKILL
    numbers = [int(file.name) for file in tmp_path.iterdir()]
    wait_for(lambda: not any(psutil.pid_exists(number) for number in numbers))


def wait_for(is_true: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_benchmark_measures_both_sides(tmp_path: Path, tokenizer_folder: Path) -> None:
    words = ["--tokenizer", str(tokenizer_folder), "--megabytes", "0.05", "--files", "2"]
    file = tmp_path / "figures.json"
    assert tokenizing.main([*words, "--rounds", "1", "--processes", "2", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())["figures"]
    assert 0.05 <= figures["megabytes"] < 1 and figures["documents"] >= 2
    for ratio in ("rate", "steady rate", "CPU seconds"):
        assert figures[ratio]["low"] <= figures[ratio]["median"] <= figures[ratio]["high"]
    assert all(len(seconds) == 1 for seconds in figures["seconds"].values())


def test_the_start_is_told_from_the_steady_rate() -> None:
    """Two seconds of start, and four for the whole text, of which a quarter is in one file."""
    seconds = {tokenizing.VERB: [6.0], tokenizing.FILE: [3.0], tokenizing.RAW: [4.0]}
    assert tokenizing.without_start(seconds, 0.25) == [4.0]
    assert tokenizing.started(seconds, 0.25) == 2.0
