"""Which signals ask a run to save, which stop other work, and what a second Ctrl-C does."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from megamask.process.signals import (
    SIGNALS,
    STOP_FILE,
    Interrupted,
    StopRequest,
    held,
    leave_to_main_thread,
    stop_on_signal,
)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_noted_and_the_old_handler_comes_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signal() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop and stop.received == number.name
    assert signal.getsignal(number) is before


def test_a_closed_terminal_and_ctrl_c_are_among_them() -> None:
    assert {"SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT"} == {number.name for number in SIGNALS}


def test_the_second_ctrl_c_leaves_at_once() -> None:
    with stop_on_signal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_file_asks_too_and_is_final(tmp_path: Path) -> None:
    stop = StopRequest()
    (tmp_path / STOP_FILE).write_text("")
    os.utime(tmp_path / STOP_FILE, (0, psutil.Process().create_time() - 1))
    assert not stop
    stop.watch(tmp_path)
    assert not stop and not (tmp_path / STOP_FILE).exists()  # it was meant for an earlier run
    (tmp_path / STOP_FILE).write_text("")
    assert stop and stop.is_final and stop.received == "megamask stop"
    stop.done()
    assert stop and not (tmp_path / STOP_FILE).exists()


def test_torchruns_second_start_still_obeys_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that was asked died before it read the file: the job is still to end. torchrun
    counts no restart on a host whose processes did not fail first.
    """
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    torchrun = SimpleNamespace(create_time=lambda: 100.0)
    process = SimpleNamespace(create_time=lambda: 200.0, parent=lambda: torchrun)
    monkeypatch.setattr(psutil, "Process", lambda: process)
    for written, is_asked in ((150, True), (50, False)):
        (tmp_path / STOP_FILE).write_text("")
        os.utime(tmp_path / STOP_FILE, (0, written))
        stop = StopRequest()
        stop.watch(tmp_path)
        assert bool(stop) == stop.is_final == (tmp_path / STOP_FILE).exists() == is_asked


def test_a_file_that_came_while_the_model_was_loaded_counts(tmp_path: Path) -> None:
    stop = StopRequest()
    (tmp_path / STOP_FILE).write_text("")
    stop.watch(tmp_path)
    assert stop and stop.is_final


def test_a_file_after_a_signal_makes_the_request_final(tmp_path: Path) -> None:
    with stop_on_signal() as stop:
        stop.watch(tmp_path)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop and not stop.is_final
        (tmp_path / STOP_FILE).write_text("")
        assert stop and stop.is_final


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES], ids=errno.errorcode.get)
def test_a_file_system_that_fails_for_a_moment_ends_no_run(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number), str(tmp_path / STOP_FILE))

    stop = StopRequest()
    (tmp_path / STOP_FILE).write_text("")
    with monkeypatch.context() as failing:
        for name in ("stat", "exists", "unlink"):
            failing.setattr(Path, name, fail)
        stop.watch(tmp_path)
        assert not stop
        stop.done()
    assert stop and stop.is_final  # the next step looks again


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_work_that_saves_nothing_is_left_where_it_is(number: signal.Signals) -> None:
    with stop_on_signal() as stop:
        stop.is_raising = True
        with pytest.raises(Interrupted) as caught:
            os.kill(os.getpid(), number)
        assert caught.value.code == 128 + number
        assert not isinstance(caught.value, Exception)  # no reader takes it for a torn file


def test_a_block_that_must_be_whole_is_left_at_its_end() -> None:
    done = []
    with stop_on_signal() as stop:
        stop.is_raising = True
        with pytest.raises(Interrupted), held():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("whole")
        assert done == ["whole"]
        with pytest.raises(Interrupted):  # and from then on at once
            os.kill(os.getpid(), signal.SIGTERM)
    with stop_on_signal() as stop, held():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop
    with held():  # no handler of ours
        pass


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signal() as stop:
            stop.is_raising = True
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_catches_nothing() -> None:
    found = []

    def ask() -> None:
        with stop_on_signal() as stop:
            found.append(bool(stop))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [False]


def test_our_threads_leave_signals_to_the_main_thread() -> None:
    masks = []

    def ask() -> None:
        leave_to_main_thread()
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, []))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert set(SIGNALS) <= masks[0]
    assert not set(SIGNALS) & signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize("code", [0, 75])
def test_a_signal_after_the_end_changes_no_code(code: int) -> None:
    script = (
        "import os, signal; from megamask.process.signals import end_with; "
        f"end_with({code}); os.kill(os.getpid(), signal.SIGTERM); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == code
