"""The benchmark of conversions: a toy model goes there and back, and the memory is that of the
process that works.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks import conversion
from tests.fork_server import ROOT, child_environment, fork_server

pytestmark = pytest.mark.slow


def run(function: str, *arguments: object) -> int:
    """A function in a process that has started no threads yet, since the benchmark forks."""
    environment = child_environment()
    with open(os.devnull, "w") as nowhere:
        child = fork_server(environment).call(
            function,
            *arguments,
            stdout=nowhere,
            stderr=nowhere,
            environment=environment,
            cwd=ROOT,
        )
    return child.wait(100)


def test_it_measures_every_side(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    words = ["--megabytes", "2", "--hidden", "64", "--rounds", "1", "--masked"]
    words += ["--folder", str(tmp_path)]
    assert run("benchmarks.conversion:main", [*words, "--json", str(file)]) == 0
    figures = json.loads(file.read_text())["figures"]
    assert 1.5e6 < figures["bytes"] < 2.5e6
    assert len(figures["gb_s"]) == 5
    for side in figures["gb_s"]:
        assert figures["cpu_s"][side] > 0
        assert figures["gb_s"][side] > 0 and figures["ratio"][side]["median"] > 0
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_memory_is_below_two_layers(tmp_path: Path) -> None:
    """Of a model of four layers of 10 MB. Buffers, threads, modules that are imported late and the
    index take some 10 MB whatever the size; a writer that held the model would take 55.
    """
    file = tmp_path / "figures.json"
    words = ["--megabytes", "58", "--hidden", "640", "--rounds", "1", "--folder", str(tmp_path)]
    assert run("benchmarks.conversion:main", [*words, "--json", str(file)]) == 0
    figures = json.loads(file.read_text())["figures"]
    assert figures["layers"] == 4 and figures["bytes"] > 50e6
    for side in (conversion.CONVERT, conversion.EXPORT, conversion.MEGATRON):
        assert figures["peak_mb"][side] < 2 * figures["layer_bytes"] / 1e6, side


def memory_of_a_known_size() -> int:
    def work() -> None:
        held = bytearray(os.urandom(2**20) * 50)
        for _ in range(20):  # the watcher looks every few milliseconds
            held[:: 2**12] = bytes(len(held) // 2**12)

    _, peak, _ = conversion.in_process(work)
    return round(peak)


def test_memory_is_counted() -> None:
    assert 50 <= run("tests.unit.benchmarks.test_conversion_benchmark:memory_of_a_known_size") < 110
