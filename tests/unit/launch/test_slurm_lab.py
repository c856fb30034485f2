"""When the tests of Slurm are skipped: where the machine cannot hold a cluster, and never for a
mistake in the tests' own code.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.conftest import open_lab
from tests.slurm.lab import Lab, LabError


class Local(Lab):
    """A lab whose hosts are this machine, so that its parts can be tried without root."""

    def _enter(self, host: str) -> list[str]:
        return ["env", f"LAB_HOST={host}"]

    def close(self) -> None:
        for process in self._daemons.values():
            process.kill()
            process.wait()


def tool(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Local:
    """Slurm's own commands would wait a minute each for settings that no lab has written."""
    for name in ("scontrol", "sinfo"):
        tool(tmp_path, name, f"echo {name} was asked")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return Local(tmp_path)


def raising(error: Exception) -> Callable[[], None]:
    def start() -> None:
        raise error

    return start


def test_a_machine_without_a_cluster_skips_and_says_why(
    lab: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab, "_start", raising(LabError("munged ended with code 1")))
    with pytest.raises(pytest.skip.Exception, match="munged ended with code 1"):
        open_lab(lab)


@pytest.mark.parametrize(
    "error",
    [
        AttributeError("x"),
        TypeError("x"),
        KeyError("x"),
        OSError("x"),
        AssertionError("x"),
        subprocess.CalledProcessError(1, "x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_mistake_of_the_lab_is_a_failure(
    lab: Local, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(lab, "_start", raising(error))
    with pytest.raises(type(error)):
        open_lab(lab)


def test_what_the_machine_refuses_is_told_apart(lab: Local, tmp_path: Path) -> None:
    tool(tmp_path, "ip", "echo 'RTNETLINK answers: Not permitted' >&2; exit 2")
    with pytest.raises(LabError, match=r"(?s)ip link add br0 on ctl.*RTNETLINK answers"):
        lab._ip("ctl", "link", "add", "br0")

    lab._daemon("munged", "ctl", "false")
    with pytest.raises(LabError, match="munged ended with code 1"):
        lab._await(lambda: False, "munged", 20)
    with pytest.raises(LabError, match="nodes: no answer in 0 s"):
        lab._daemons.clear()
        lab._await(lambda: False, "nodes", 0)
    nothing: dict[str, bool] = {}
    with pytest.raises(KeyError):
        lab._await(lambda: nothing["mistake"], "nodes", 1)
    # a job that fails, with the queue beside it
    with pytest.raises(AssertionError, match=r"(?s)steps: not in 0 s.scontrol.*sinfo was asked"):
        lab.wait(lambda: False, "steps", 0)
