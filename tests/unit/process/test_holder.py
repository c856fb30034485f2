"""A holder lives only while its own process does: not a stranger of its number, nor a zombie."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest

from megamask.liveness import ENDED, boot_id, lives, start_of
from megamask.process.holder import Holder

HERE = Holder.this_process("megamask other")


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def test_the_number_of_a_process_that_ended_may_be_a_strangers(
    child: subprocess.Popen[bytes],
) -> None:
    own = replace(HERE, pid=child.pid, start=start_of(child.pid))
    assert own.is_here() and own.is_running()
    before = str(int(own.start) - 1)  # the process that had the number before
    for start in (before, ""):  # "": the note of a version that did not know
        assert not replace(own, start=start).is_running()


def test_a_zombie_has_ended(child: subprocess.Popen[bytes]) -> None:
    own = replace(HERE, pid=child.pid, start=start_of(child.pid))
    child.kill()  # nobody waits for it yet
    end = time.monotonic() + 10
    while start_of(child.pid) != ENDED:
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(child.pid, 0)  # its number is still taken
    assert not own.is_running() and not replace(own, start=ENDED).is_running()


@pytest.mark.parametrize("number", [0, -1, -os.getpgid(0), 2**22 + 1, 2**70])
def test_numbers_that_are_no_process(number: int) -> None:
    """0 and below would name groups of processes, this one's or all."""
    assert not lives(number, "") and not replace(HERE, pid=number).is_running()


def test_a_container_has_numbers_of_its_own() -> None:
    other = replace(HERE, machine=f"{boot_id()} another space")
    assert not other.is_here() and other.shares_kernel()
    assert HERE.is_here() and HERE.shares_kernel()
    assert not replace(HERE, machine="another boot").shares_kernel()


def test_a_process_is_known_again_and_a_stranger_is_not() -> None:
    assert Holder.read(asdict(HERE)) == HERE
    assert HERE.is_process_of(replace(HERE, what="x", since="then"))
    assert not HERE.is_process_of(replace(HERE, start="1"))
    assert not HERE.is_process_of(replace(HERE, pid=1))
    old = {key: value for key, value in asdict(HERE).items() if key != "start"}
    assert Holder.read(old) == replace(HERE, start="")
