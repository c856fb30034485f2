"""A path holds a whole artefact or nothing, no matter when the process dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megamask.errors import ArtifactError
from megamask.leftovers import remove_leftovers, temporary_name
from megamask.storage import (
    atomic_dir,
    atomic_file,
    read_json,
    require_writable,
    write_json,
)


class BrokenError(Exception):
    """An error while an artefact is written."""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.bin"
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"whole")
        assert (
            not path.exists() and temporary.parent == path.parent
        )  # same file system, so the rename is atomic
    assert path.read_bytes() == b"whole" and names(path.parent) == {"a.bin"}


def test_a_file_survives_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(BrokenError), atomic_file(path) as temporary:
        temporary.write_bytes(b"half")
        raise BrokenError
    assert path.read_bytes() == b"old" and names(tmp_path) == {"a.bin"}


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    for name in ("first", "second"):
        with atomic_dir(path) as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / name).write_text(name)
        assert names(path / "sub") == {name}  # nothing of the older folder is left
    assert names(tmp_path) == {"weights"}


def test_a_folder_survives_an_error(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with atomic_dir(path) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(BrokenError), atomic_dir(path) as temporary:
        (temporary / "a").write_text("half")
        raise BrokenError
    assert (path / "a").read_text() == "old" and names(tmp_path) == {"weights"}


WRITER = """
import contextlib, sys, time
from pathlib import Path
from megamask.storage import atomic_dir, atomic_file

root, stops_in, is_plain = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "plain"

@contextlib.contextmanager
def in_place(path):
    yield path

def reached(where):
    print(where, flush=True)
    if where == stops_in:
        time.sleep(60)

number = 0
while True:
    number += 1
    with (in_place if is_plain else atomic_file)(root / "file") as path, open(path, "wb") as handle:
        for part in range(64):
            if number == 2 and part == 40:
                reached("file")
            handle.write(bytes([number % 256]) * 4096)
            handle.flush()
    if is_plain:
        (root / "folder").mkdir(exist_ok=True)
    with (in_place if is_plain else atomic_dir)(root / "folder") as path:
        for part in range(8):
            if number == 2 and part == 4:
                reached("folder")
            (path / str(part)).write_text(str(number))
    reached("end")
"""


def kill_a_writer(root: Path, stops_in: str, way: str, delay: float = 0.0) -> list[str]:
    """What is torn after SIGKILL of a process that rewrites a file and a folder, in the middle of
    the second version of ``stops_in``, or ``delay`` seconds after its first version of both.
    """
    command = [sys.executable, "-c", WRITER, str(root), stops_in, way]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    try:
        for line in writer.stdout:
            if line.strip() == (stops_in or "end"):
                break
        time.sleep(delay)
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
    content, torn = (root / "file").read_bytes(), []
    if len(content) != 64 * 4096 or len(set(content)) != 1:
        torn.append("file")
    if (root / "folder").exists():
        parts = [root / "folder" / str(part) for part in range(8)]
        if len({part.read_text() for part in parts}) != 1:
            torn.append("folder")
    return torn


@pytest.mark.parametrize(
    ("stops_in", "delay"), [("file", 0.0), ("folder", 0.0), ("", 0.003), ("", 0.027)]
)
def test_a_killed_writer_leaves_whole_artefacts(
    tmp_path: Path, stops_in: str, delay: float
) -> None:
    """After SIGKILL in a rewrite, each path holds a whole version.

    A folder may also be missing, when the signal came between its two renames.
    """
    assert kill_a_writer(tmp_path, stops_in, "atomic", delay) == []
    remove_leftovers(tmp_path)
    assert names(tmp_path) <= {"file", "folder"}


@pytest.mark.parametrize("stops_in", ["file", "folder"])
def test_a_plain_write_would_be_torn(tmp_path: Path, stops_in: str) -> None:
    """The check above can fail: the same kill tears what is written in place."""
    assert kill_a_writer(tmp_path, stops_in, "plain") == [stops_in]


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    """The names of a process that has ended go; those of this process and of strangers stay."""
    code = (
        "import sys; from pathlib import Path; from megamask.leftovers import temporary_name; "
        "print(temporary_name(Path(sys.argv[1])))"
    )
    for name in ("a", "b"):
        command = [sys.executable, "-c", code, str(tmp_path / name)]
        dead = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout[:-1])
        if name == "a":
            dead.write_text("torn")
        else:
            dead.mkdir()
    own = temporary_name(tmp_path / "a")
    own.write_text("being written")
    foreign = tmp_path / ".a.megamask-ffffff-1-2-abcd.tmp"  # of another machine
    foreign.write_text("being written there")
    kept = {own.name, foreign.name, ".hidden", "b.tmp", ".a.01234567.tmp"}
    for name in kept - {own.name, foreign.name}:
        (tmp_path / name).write_text("the user's own")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == kept
    os.utime(foreign, (0, 0))
    remove_leftovers(tmp_path)
    assert names(tmp_path) == kept - {foreign.name}
    remove_leftovers(tmp_path, is_alone=True)
    assert names(tmp_path) == {".hidden", "b.tmp"}


def test_a_temporary_name_fits_beside_the_longest_name(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 127)
    with atomic_file(path) as temporary:
        temporary.write_text("x")
    assert path.read_text() == "x"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """A path below a file, which no user can write, not even root."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError) as caught:
        require_writable(tmp_path / "file" / "runs", "run_dir")
    assert "run_dir" in caught.value.fix and str(tmp_path) in str(caught.value)


@pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="needs /proc, where nobody can make a file"
)
def test_a_file_system_that_refuses_files() -> None:
    with pytest.raises(ArtifactError, match="export.out"):
        require_writable(Path("/proc/self"), "export.out")


def test_a_writable_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    require_writable(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == set()


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"path": Path("x"), "value": 1.5})
    assert read_json(path, "Make it.") == {"path": "x", "value": 1.5} and path.read_text().endswith(
        "}\n"
    )
    path.write_text(json.dumps({"a": 1})[:-1])
    with pytest.raises(ArtifactError, match="Make it."):
        read_json(path, "Make it.")
    with pytest.raises(ArtifactError, match="is missing. Make it."):
        read_json(tmp_path / "b.json", "Make it.")


def test_json_holds_null_for_numbers_that_are_not_finite(tmp_path: Path) -> None:
    value = {"a": [1.5, float("nan")], "b": {"c": float("inf"), "d": (float("-inf"), 2)}}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text()
    expected = {"a": [1.5, None], "b": {"c": None, "d": [None, 2]}}
    assert json.loads(text, parse_constant=pytest.fail) == expected
