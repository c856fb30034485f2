"""Locks: one writer, or several readers; a dead holder holds nothing; a second start hears who."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, redirect_stderr
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megamask.__main__ import main
from megamask.errors import ArtifactError, MegamaskError
from megamask.liveness import boot_id, start_of
from megamask.process import lock as lock_file
from megamask.process.holder import Holder
from megamask.process.lock import locked, writer_of
from megamask.process.lock_file import SILENCE, Kernel
from tests.unit.test_machine_errors import as_nobody, in_child, no_large_files

HERE = Holder.this_process("megamask other")
PARENT = replace(HERE, pid=os.getppid(), start=start_of(os.getppid()))
ELSEWHERE = replace(HERE, host="n2", machine="another system", job="77")


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal comes at once, and not after a second in which the holder might have ended."""
    monkeypatch.setattr(lock_file, "PATIENCE", 0.0)


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    return tmp_path / "run" / "weights"


def lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def name_of_writer(path: Path) -> str:
    found = writer_of(path)
    assert found is not None and found.pid == os.getpid()
    return found.what


def leave(path: Path, holder: Holder, age: float, writes: bool = True) -> None:
    """The lock file of a holder whose last touch was ``age`` seconds ago, and no lock on it."""
    lock = lock_of(path)
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.write_text(json.dumps({**asdict(holder), "writes": writes}) + "\n")
    os.utime(lock, (time.time() - age,) * 2)


def test_writers_exclude_everybody_and_readers_exclude_writers(artefact: Path) -> None:
    with locked("megamask convert", [artefact]):
        assert name_of_writer(artefact) == "megamask convert"
        for writes, reads in (([artefact], []), ([], [artefact])):
            with pytest.raises(ArtifactError) as caught, locked("x", writes, reads):
                pass
            message = str(caught.value)
            assert f"is being written by megamask convert (process {os.getpid()} on" in message
            assert f"kill {os.getpid()} on" in message and str(artefact) in message
    assert writer_of(artefact) is None and not lock_of(artefact).exists()
    artefact.parent.mkdir(exist_ok=True)
    with locked("megamask learn", [], [artefact]), ExitStack() as stack:
        stack.enter_context(locked("megamask prune", [], [artefact]))
        assert writer_of(artefact) is None
        with pytest.raises(ArtifactError, match="is being read by megamask learn"):
            stack.enter_context(locked("x", [artefact]))
    with locked("x", [artefact]):
        pass
    assert not lock_of(artefact).exists()


def test_a_refusal_lets_go_of_what_was_taken_before(tmp_path: Path) -> None:
    with locked("first", [tmp_path / "b"]):
        with pytest.raises(ArtifactError), locked("second", [tmp_path / "a", tmp_path / "b"]):
            pass
        with locked("third", [tmp_path / "a"]):
            pass


def test_a_link_leads_to_the_same_lock(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with locked("first", [tmp_path / "link"]), pytest.raises(ArtifactError), ExitStack() as stack:
        stack.enter_context(locked("second", [tmp_path / "real"]))


def test_folders_made_for_a_lock_go_with_it(artefact: Path) -> None:
    with locked("x", [artefact]):
        assert lock_of(artefact).exists()
    assert not artefact.parent.exists()
    with locked("x", [], [artefact]):  # a reader makes nothing
        assert not artefact.parent.exists()


def test_where_nothing_can_be_written_there_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with locked("x", [tmp_path / "file" / "weights"], [tmp_path / "no" / "shards"]):
        pass


@pytest.mark.parametrize("kernel", [True, False], ids=["flock", "no-flock"])
@pytest.mark.parametrize(
    ("holder", "age", "held"),
    [
        (ELSEWHERE, 5.0, (True, True)),
        (ELSEWHERE, SILENCE + 5, (False, False)),
        # With flock a file without a lock has no holder on this system. Without flock, a process
        # that runs (the parent of this one) has it.
        (PARENT, 1000.0, (False, True)),
        (replace(PARENT, start=HERE.start), 0.0, (False, False)),
        (replace(PARENT, machine=f"{boot_id()} 1"), 5.0, (False, True)),  # flock knows containers
        (replace(HERE, pid=2**22 + 1), 0.0, (False, False)),  # above the largest number
    ],
    ids=["other host", "silent host", "running", "reused", "other container", "gone"],
)
def test_a_file_that_a_holder_left(
    artefact: Path,
    monkeypatch: pytest.MonkeyPatch,
    kernel: bool,
    holder: Holder,
    age: float,
    held: tuple[bool, bool],
) -> None:
    if not kernel:
        monkeypatch.setattr(lock_file, "flock", lambda *_: Kernel.ABSENT)
    leave(artefact, holder, age)
    if held[0 if kernel else 1]:
        with pytest.raises(ArtifactError) as caught, locked("x", [artefact]):
            pass
        fix = "scancel 77" if holder.job else f"kill {holder.pid}"
        assert fix in str(caught.value) and f"delete {lock_of(artefact)}" in str(caught.value)
        assert lock_of(artefact).exists()
        return
    with locked("x", [artefact]):
        assert name_of_writer(artefact) == "x"
    assert not lock_of(artefact).exists()


def test_a_holder_is_known_where_nothing_can_be_written(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As through a mount that is read alone: ``status`` said that the run had not started."""

    def refuses(path: Path, *words: object, **more: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    with locked("megamask learn", [artefact]), monkeypatch.context() as patch:
        for name in ("touch", "unlink"):
            patch.setattr(Path, name, refuses)
        assert name_of_writer(artefact) == "megamask learn"


def test_rubbish_in_the_file_is_nobody(artefact: Path) -> None:
    artefact.parent.mkdir(parents=True)
    lock_of(artefact).write_bytes(b'\xff{"what": 3}\n[]\n{"what": "x", "pid": true}\n{"')
    assert writer_of(artefact) is None
    with locked("x", [artefact]):
        pass


@pytest.mark.skipif(os.getuid() != 0, reason="two users")
@pytest.mark.parametrize("writes", [True, False])
def test_the_lock_of_another_user_is_a_lock(tmp_path: Path, writes: bool) -> None:
    """Root in a container and the folder's owner outside: a file that is read alone was no lock."""
    own = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's folders are root's alone
    try:
        os.chmod(own, 0o755)
        os.chown(own, 65534, 65534)
        artefact = own / "weights"
        said: list[str] = []

        def taken_by_nobody(verb: str, lists: tuple[list[Path], list[Path]]) -> str:
            def work() -> None:
                with locked(verb, *lists):
                    pass

            return in_child(work, as_nobody)

        def asked() -> list[bool]:
            asks: list[tuple[list[Path], list[Path]]] = [([artefact], []), ([], [artefact])]
            said[:] = [taken_by_nobody("megamask prune", lists) for lists in asks]
            return [bool(one) for one in said]

        with locked("megamask learn", *([artefact], []) if writes else ([], [artefact])):
            lock_of(artefact).chmod(0o644)
            assert asked() == [True, writes]
            assert f"is being {'written' if writes else 'read'} by megamask learn" in said[0]
        leave(artefact, replace(HERE, pid=2**22 + 1), 0.0)  # left behind, and root's
        lock_of(artefact).chmod(0o644)
        assert asked() == [False, False] and not lock_of(artefact).exists()
        os.chmod(own, 0o775)  # a folder of a group
        with locked("megamask learn", [artefact]):
            assert lock_of(artefact).stat().st_mode & 0o777 == 0o664
    finally:
        shutil.rmtree(own)


def test_a_reader_that_ended_is_named_no_more(artefact: Path) -> None:
    """The user would wait for nobody, or end whoever has that number now."""
    artefact.parent.mkdir()
    with ExitStack() as second:
        with locked("megamask evaluate", [], [artefact]):
            second.enter_context(locked("megamask tasks", [], [artefact]))
        with pytest.raises(ArtifactError, match="read by megamask tasks"), locked("x", [artefact]):
            pass
        assert "evaluate" not in lock_of(artefact).read_text()
    assert not lock_of(artefact).exists()


@pytest.mark.parametrize("kernel", [Kernel.TAKEN, Kernel.ABSENT])
def test_a_reader_elsewhere_stays_where_locks_are_of_one_host(
    artefact: Path, monkeypatch: pytest.MonkeyPatch, kernel: Kernel
) -> None:
    """A reader that came and went removed the line of the other host, whose writer then began."""
    monkeypatch.setattr(lock_file, "flock", lambda *_: kernel)
    leave(artefact, ELSEWHERE, 5.0, writes=False)
    with locked("megamask evaluate", [], [artefact]):
        pass
    with pytest.raises(ArtifactError, match="scancel 77"), locked("x", [artefact]):
        pass


def test_without_flock_the_content_decides(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_file, "flock", lambda *_: Kernel.ABSENT)
    with another_process(artefact) as pid, pytest.raises(ArtifactError, match=f"process {pid} on"):
        ExitStack().enter_context(locked("x", [artefact]))


class another_process:  # noqa: N801 - used as a function
    """A process that holds ``path`` as its writer until the block ends, by SIGKILL."""

    def __init__(self, path: Path) -> None:
        code = (
            "import sys, time; from pathlib import Path; from megamask.process.lock import locked\n"
            "with locked('megamask learn', [Path(sys.argv[1])]): print('held', flush=True); "
            "time.sleep(60)"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> int:
        assert self.process.stdout is not None and self.process.stdout.readline() == "held\n"
        return self.process.pid

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def test_a_killed_holder_holds_nothing(artefact: Path) -> None:
    with another_process(artefact) as pid:
        with pytest.raises(ArtifactError, match=f"process {pid} on"), locked("x", [artefact]):
            pass
        found = writer_of(artefact)
        assert found is not None and found.pid == pid
    assert lock_of(artefact).exists() and writer_of(artefact) is None
    with locked("x", [artefact]):
        pass


def test_a_forked_child_keeps_no_lock(artefact: Path) -> None:
    """The child of a holder that was killed goes on; it has none of the locks."""
    code = (
        "import os, sys, time; from pathlib import Path\n"
        "from megamask.process.lock import locked\n"
        "with locked('x', [Path(sys.argv[1])]):\n"
        "    if os.fork() == 0: print('forked', flush=True); time.sleep(60); os._exit(0)\n"
        "    time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(artefact)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert parent.stdout is not None and parent.stdout.readline() == "forked\n"
        parent.kill()
        parent.wait()
        with locked("y", [artefact]):
            pass
    finally:
        os.killpg(parent.pid, signal.SIGKILL)


def test_a_living_holder_touches_its_file(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_file, "BEAT", 0.02)
    with locked("x", [artefact]):
        os.utime(lock_of(artefact), (0, 0))
        end = time.monotonic() + 10
        while lock_of(artefact).stat().st_mtime == 0:
            assert time.monotonic() < end, "nobody touched the file"
            time.sleep(0.01)


def test_links_in_a_circle_and_the_root_get_no_error_of_the_lock(tmp_path: Path) -> None:
    """Whoever opens such an artefact tells of it; Path.resolve raises RuntimeError."""
    (tmp_path / "weights").symlink_to("weights")
    with locked("x", [tmp_path / "weights", Path("/")], [Path("/")]):
        assert writer_of(tmp_path / "weights") is not None and writer_of(Path("/")) is None


def test_a_pipe_in_the_place_of_a_lock_is_not_waited_for(artefact: Path) -> None:
    artefact.parent.mkdir()
    os.mkfifo(lock_of(artefact))
    assert writer_of(artefact) is None


@pytest.mark.parametrize("writes", [True, False])
def test_a_full_disk_is_one_message_and_leaves_no_lock(artefact: Path, writes: bool) -> None:
    artefact.parent.mkdir()

    def lock() -> None:
        with locked("x", *(([artefact], []) if writes else ([], [artefact]))):
            pass

    told = in_child(lock, lambda: no_large_files(0))
    assert told.startswith(f"{lock_of(artefact)}: cannot be written (File too large)"), told
    assert list(artefact.parent.iterdir()) == []


@pytest.mark.parametrize("words", [
    ["evaluate"], ["prune"], ["extract", "wanda", "{}/x.safetensors"],
    ["plan", "--model", "llama2-7b", "--json", "{}/plan.json"],
])  # fmt: skip
def test_a_verb_on_a_full_disk_is_one_message(tmp_path: Path, words: list[str]) -> None:
    def verb() -> None:
        with redirect_stderr(io.StringIO()) as said:
            code = main([*(word.format(tmp_path) for word in words), f"run_dir={tmp_path}"])
        raise MegamaskError(f"{code} {said.getvalue()}")

    told = in_child(verb, lambda: no_large_files(0))
    assert told.startswith(f"2 megamask: error: {tmp_path}/.") and told.count("\n") == 1, told
    assert ".lock: cannot be written (File too large)" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("setting", ["run_dir={}/x", "model.hf={}", "export.out={}"])
@pytest.mark.parametrize("verb", ["export", "learn", "report"])
def test_a_verb_that_meets_links_in_a_circle_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    verb: str, setting: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    words = ["run_dir=run", setting.format("loop"), "learn.prior.mask=loop"]
    assert main([verb, *words]) == 2
    assert capsys.readouterr().err.count("megamask: error: ") == 1
