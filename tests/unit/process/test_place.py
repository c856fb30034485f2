"""Which rank a process is, under every launcher; and what is refused."""

from __future__ import annotations

import re

import pytest

from megamask.errors import ConfigError
from megamask.process.place import Place, first_node, this_place

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29501",
}
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "16"}
TASK = {
    **JOB,
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "n[2,5]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Place()),
        (TORCHRUN, Place(3, 4, 1, "n1", 29501)),
        ({**TORCHRUN, "MASTER_PORT": ""}, Place(3, 4, 1, "n1", 29500)),
        ({**TORCHRUN, **TASK, "SLURM_PROCID": "0"}, Place(3, 4, 1, "n1", 29501)),
        (TASK, Place(3, 4, 1, "n2", 20209)),  # 20000 + job 7 + 101 x step 2
        ({**TASK, "MASTER_ADDR": "x", "MASTER_PORT": "5"}, Place(3, 4, 1, "x", 5)),
        ({**TASK, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Place()),
        # the shell of salloc; the batch script; the shell's step of newer versions
        (JOB, Place()),
        ({**JOB, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}, Place()),
        ({**JOB, "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290"}, Place()),
        ({**JOB, "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967291"}, Place()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Place()),
    ],
)
def test_the_place(environment: dict[str, str], expected: Place) -> None:
    assert this_place(environment) == expected


def test_tasks_of_a_step_share_master_and_port_and_number_one_another() -> None:
    tasks = [this_place({**TASK, "SLURM_PROCID": str(number)}) for number in range(4)]
    assert [task.rank for task in tasks] == [0, 1, 2, 3]
    assert {(task.master, task.port, task.world) for task in tasks} == {("n2", 20209, 4)}
    assert [task.is_main for task in tasks] == [True, False, False, False]
    assert [task.label for task in tasks[:2]] == ["", " (rank 1)"]


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["x", "-1", "1.0", " 1", "1_0", "٣", "9" * 30])
def test_garbage_is_named(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} = {re.escape(repr(value))}: "):
        this_place({**TORCHRUN, name: value})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"RANK": "4"}, "RANK = 4: below WORLD_SIZE=4"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE = '0'"),
        ({"RANK": ""}, "RANK = None"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR = ''"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT = '0'"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT = '65536'"),
    ],
)
def test_contradictions_are_named(change: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        this_place({**TORCHRUN, **change})


def test_half_of_what_a_launcher_sets_is_refused() -> None:
    for name in ("RANK", "WORLD_SIZE"):
        with pytest.raises(ConfigError, match="or unset RANK and WORLD_SIZE"):
            this_place({name: "0" if name == "RANK" else "2"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n07,x", "n07"),
        ("n[07-12,15],x1", "n07"),
        ("n[5,7]", "n5"),
        ("rack[1-2]n[03-4]x,y", "rack1n03x"),
        ("gpu-a-1.example.org,gpu-a-2", "gpu-a-1.example.org"),
        ("", ""),
    ],
)
def test_the_first_node(nodes: str, first: str) -> None:
    assert first_node(nodes) == first
