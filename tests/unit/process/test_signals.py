"""Which signals ask a run to save, and what a second Ctrl-C does."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from megamask.process.signals import SIGNALS, STOP_FILE, StopRequest, stop_on_signal


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
    assert not stop
    stop.watch(tmp_path)
    assert not stop and not (tmp_path / STOP_FILE).exists()  # it was meant for an earlier run
    (tmp_path / STOP_FILE).write_text("")
    assert stop and stop.is_final and stop.received == "megamask stop"
    stop.done()
    assert stop and not (tmp_path / STOP_FILE).exists()


def test_a_file_after_a_signal_makes_the_request_final(tmp_path: Path) -> None:
    with stop_on_signal() as stop:
        stop.watch(tmp_path)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop and not stop.is_final
        (tmp_path / STOP_FILE).write_text("")
        assert stop and stop.is_final
