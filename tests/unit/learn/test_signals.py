"""Which signals ask a run to save, and what a second Ctrl-C does."""

from __future__ import annotations

import os
import signal

import pytest

from megamask.learn.signals import SIGNALS, stop_on_signal


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
