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
import sys, time
from pathlib import Path
from megamask.storage import atomic_dir, atomic_file

root = Path(sys.argv[1])
number = 0
while True:
    number += 1
    with atomic_file(root / "file") as temporary, open(temporary, "wb") as handle:
        for _ in range(64):
            handle.write(bytes([number % 256]) * 4096)
            handle.flush()
    with atomic_dir(root / "folder") as temporary:
        for part in range(8):
            (temporary / str(part)).write_text(str(number))
    print(number, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.011, 0.027, 0.05])
def test_a_killed_writer_leaves_whole_artefacts(tmp_path: Path, delay: float) -> None:
    """After SIGKILL in an endless rewrite, each path holds a whole version.

    A folder may also be missing, when the signal came between its two renames.
    """
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    try:
        writer.stdout.readline()  # the first version is there
        time.sleep(delay)
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
    content = (tmp_path / "file").read_bytes()
    assert len(content) == 64 * 4096 and len(set(content)) == 1
    if (tmp_path / "folder").exists():
        parts = [(tmp_path / "folder" / str(part)).read_text() for part in range(8)]
        assert len(set(parts)) == 1
    remove_leftovers(tmp_path)
    assert names(tmp_path) <= {"file", "folder"}


def test_a_plain_write_would_be_torn(tmp_path: Path) -> None:
    """The check above can fail: the same kill tears a file that is written in place."""
    code = (
        f"h = open({str(tmp_path / 'file')!r}, 'wb'); h.write(b'x' * 4096); h.flush(); "
        "print(1, flush=True); import time; time.sleep(60)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert (tmp_path / "file").stat().st_size < 64 * 4096


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
