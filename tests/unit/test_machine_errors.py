"""An error of the disk is one message with path, problem and fix; an output keeps its links."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megamask.__main__ import main
from megamask.errors import EXIT_USER_ERROR, ArtifactError, MegamaskError
from megamask.machine_errors import explained, reading, writing
from megamask.storage import atomic_dir, atomic_file, read_json, write_json
from megamask.weights.hf_files import HFReader

NOBODY = 65534
LIMIT = 4096  # bytes that a file may have


def in_child(work: Callable[[], Any], before: Callable[[], Any]) -> str:
    """The message that ``work`` ends with in a child process, after ``before``; empty if none."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            before()
            work()
            code = 0
        except MegamaskError as error:
            os.write(write, str(error).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        told = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "another exception"
    return told


def no_large_files(limit: int = LIMIT) -> None:
    """As a full disk: a write fails in the middle of a file."""
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def as_nobody() -> None:
    """Without the rights of root, which may write anywhere."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def folder_with_tensors(path: Path) -> None:
    with atomic_dir(path) as folder:
        save_file({"a": torch.zeros(LIMIT)}, folder / "a.safetensors")


def array(path: Path) -> None:
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, np.zeros(LIMIT))


def archive(path: Path) -> None:
    with atomic_file(path) as temporary:
        torch.save(torch.zeros(2 * LIMIT), temporary)


WRITERS: dict[str, Callable[[Path], None]] = {
    "json": lambda path: write_json(path, list(range(LIMIT))),
    "safetensors": folder_with_tensors,
    "torch": archive,
    "numpy": array,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_cannot_grow(tmp_path: Path, name: str) -> None:
    path = tmp_path / "out"
    told = in_child(lambda: WRITERS[name](path), no_large_files)
    assert told.startswith(f"{path}: cannot be written (")
    assert told.endswith("; then run the same command.") or "Free some space" in told
    assert list(tmp_path.iterdir()) == []  # no half of it, and no temporary name
    WRITERS[name](path)  # the right answer without the limit
    assert path.exists()


def test_a_copy_that_does_not_fit_names_the_output(tmp_path: Path) -> None:
    """shutil names the source of a copy first, which is not what cannot be written."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.write_bytes(bytes(4 * LIMIT))

    def copy() -> None:
        with atomic_dir(out) as folder:
            shutil.copyfile(source, folder / "copy")

    told = in_child(copy, no_large_files)
    assert told.startswith(f"{out}: cannot be written (File too large)"), told
    assert not out.exists() and list(tmp_path.iterdir()) == [source]


def test_a_full_device(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match="No space left on device.*Free some space"),
        writing(tmp_path / "out"),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"x")


@pytest.fixture
def closed() -> Iterator[Path]:
    """A folder that root alone may enter, below folders that all may enter."""
    with tempfile.TemporaryDirectory(prefix="megamask-test-", dir="/tmp") as above:
        Path(above).chmod(0o755)
        (Path(above) / "closed").mkdir(mode=0o700)
        yield Path(above) / "closed"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_folder_without_permission(closed: Path) -> None:
    (closed / "a.json").write_text("{}")
    told = in_child(lambda: write_json(closed / "b.json", 1), as_nobody)
    assert told.startswith(f"{closed / 'b.json'}: cannot be written (Permission denied). Ask for")
    told = in_child(lambda: read_json(closed / "a.json", "Make it."), as_nobody)
    assert (
        told == f"{closed / 'a.json'}: cannot be read as a JSON text (Permission denied). Make it."
    )
    assert read_json(closed / "a.json", "") == {}


def test_places_where_no_file_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    cases = {
        Path("/proc/x.json"): "No such file or directory",
        tmp_path / "file" / "x.json": "File exists|Not a directory",
        tmp_path / "folder": "Is a directory.*Choose the name of a file",
        tmp_path / ("x" * 300): "File name too long.*shorter",
        tmp_path / "/".join(["y" * 200] * 30): "File name too long.*shorter",
    }
    for path, said in cases.items():
        with pytest.raises(ArtifactError, match=f"cannot be written .*({said})"):
            write_json(path, {})
    for path in (Path("."), Path("/"), Path(".."), tmp_path / "..", Path("")):
        said = r"cannot be written \(Is a directory\)\. Choose a name within it\.$"
        with pytest.raises(ArtifactError, match=said):
            write_json(path, {})
        with pytest.raises(ArtifactError, match=said), atomic_dir(path):
            pass
    with (
        pytest.raises(ArtifactError, match=r"cannot be written \(Not a directory\)"),
        atomic_dir(tmp_path / "file") as folder,
    ):
        (folder / "a").write_text("")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", os.fsdecode(b"a\xe9b"), "日本 語"])
def test_odd_names_are_written_and_told_in_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_json(path, {"a": 1})
    assert read_json(path, "") == {"a": 1}
    with pytest.raises(ArtifactError) as caught:
        read_json(path.with_name(f"{name}2"), "Make it.")
    told = str(caught.value)
    assert told.isprintable() and told.endswith("is missing. Make it.")


def test_inputs_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # whoever opens it waits for ever
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    cases = {"pipe": "a FIFO", ".": "a folder", "circle": "symbolic links", "nowhere": "a link to"}
    for name, said in cases.items():
        with pytest.raises(ArtifactError, match=said):
            read_json(tmp_path / name, "Make it.")
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match="a FIFO"):
        HFReader(tmp_path)


def test_an_output_keeps_its_link(tmp_path: Path) -> None:
    big, small = tmp_path / "big", tmp_path / "small"
    big.mkdir()
    small.mkdir()
    (big / "old").mkdir()
    (small / "weights").symlink_to(big / "old")
    (small / "new").symlink_to(Path("..") / "big" / "sub" / "new")  # leads nowhere yet
    (small / "file").symlink_to(big / "file")
    for name in ("weights", "new", "weights"):
        with atomic_dir(small / name) as folder:
            assert folder.parent == (small / name).resolve().parent
            (folder / "a").write_text(name)
        assert (small / name).is_symlink() and (small / name / "a").read_text() == name
    for value in (1, 2):
        write_json(small / "file", value)
        assert (small / "file").is_symlink() and read_json(big / "file", "") == value
    assert sorted(path.name for path in big.rglob("*")) == ["a", "a", "file", "new", "old", "sub"]


def test_a_link_to_another_file_system(tmp_path: Path) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system only")
    target = other / f"megamask-test-{os.getpid()}"
    (tmp_path / "weights").symlink_to(target)
    try:
        for text in ("first", "second"):
            with atomic_dir(tmp_path / "weights") as folder:
                (folder / "a").write_text(text)
        assert (target / "a").read_text() == "second" and (tmp_path / "weights").is_symlink()
    finally:
        subprocess.run(["rm", "-r", str(target)], check=True)


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(ArtifactError, match="leads back to itself"):
        write_json(tmp_path / "a", {})
    with pytest.raises(ArtifactError, match="leads back to itself"), atomic_dir(tmp_path / "b"):
        pass


def test_an_input_that_fails_within_an_output_is_named_itself(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match=r"/elsewhere: cannot be used \(No such file"),
        atomic_file(tmp_path / "out"),
    ):
        Path("/elsewhere").read_text()
    beside = tmp_path / "out-8b" / "config.json"  # its name only begins as the output's does
    with (
        pytest.raises(ArtifactError, match=rf"^{beside}: cannot be used \(No such file"),
        atomic_dir(tmp_path / "out"),
    ):
        beside.read_text()
    with (
        pytest.raises(ArtifactError, match=rf"^{tmp_path / 'out'}: cannot be written"),
        atomic_dir(tmp_path / "out") as folder,
    ):
        (folder / "missing" / "a").write_text("")
    with pytest.raises(ConnectionError), atomic_file(tmp_path / "out"):  # not the disk's
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "out"):
        _ = 1 / 0


def test_errors_of_libraries_are_understood() -> None:
    told = explained(OSError(errno.EIO, "Input/output error", "/data/x"))
    assert told is not None and "/data/x: cannot be used (Input/output error)" in str(told)
    for number in (errno.ENOSPC, errno.EPIPE):  # a write to stdout has no name
        told = explained(OSError(number, os.strerror(number)))
        assert f"an output: cannot be written ({os.strerror(number)})" in str(told)
    assert explained(ConnectionResetError(errno.ECONNRESET, "reset by peer")) is None
    assert explained(RuntimeError("shape mismatch")) is None and explained(ValueError()) is None
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**48)
    assert "memory" in str(explained(caught.value))
    assert "memory" in str(explained(MemoryError()))
    for text in ("Worker failure: [Errno 28] No space", "I/O error: No space (os error 28)"):
        with pytest.raises(ArtifactError, match="No space left"), writing(Path("out")):
            raise RuntimeError(text)
    with (
        pytest.raises(ArtifactError, match=r"x: is missing\. Make it"),
        reading(Path("x"), "Make it."),
    ):
        Path("x/y").read_bytes()


def test_a_program_that_meets_a_closed_place_says_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The net under every verb: no library's error for a path that the system refuses."""
    assert main(["inspect", "run_dir=" + "/".join(["y" * 200] * 30)]) == EXIT_USER_ERROR
    told = capsys.readouterr().err
    assert "File name too long" in told and told.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["settings"],
        pytest.param(["recipes"], marks=pytest.mark.nightly),
        ["--help"],
        pytest.param(["plan", "--help"], marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_an_output_that_takes_nothing_is_one_line(words: list[str]) -> None:
    command = [sys.executable, "-m", "megamask", *words]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "an output: cannot be written (No space left on device)" in done.stderr


def test_an_output_that_nobody_reads_ends_as_by_sigpipe() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "megamask", "settings"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")
