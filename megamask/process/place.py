"""The place of this process among the ranks of its job, from the launcher's environment.

torchrun and the launch scripts set RANK and WORLD_SIZE. ``srun`` alone sets SLURM_PROCID and
SLURM_STEP_NUM_TASKS for each task. The batch script of a job and the shell of ``salloc`` carry
Slurm's variables too, but belong to no step that ``srun`` started: there one process runs alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from megamask.errors import ConfigError

# Slurm numbers steps from 0. The highest numbers are its own: batch scripts, interactive shells.
FIRST_RESERVED_STEP = 0xFFFFFFF0
PORT = 29500  # of torchrun too


@dataclass(frozen=True)
class Place:
    """The place of a process.

    Attributes:
        rank, world: number of the process, and number of all processes.
        local_rank: number of the process on its host.
        master, port: where rank 0 can be reached; "" and 0 for one process.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    master: str = ""
    port: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes shared files and talks to the user."""
        return self.rank == 0

    @property
    def label(self) -> str:
        """What to call the process in a message; empty for rank 0."""
        return "" if self.is_main else f" (rank {self.rank})"


def this_place(environment: Mapping[str, str] = os.environ) -> Place:
    """The place of this process.

    Raises:
        ConfigError: the launcher's variables contradict each other or are no numbers.
    """
    if "WORLD_SIZE" in environment or "RANK" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        master, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    elif _is_slurm_task(environment):
        tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
        names = ("SLURM_PROCID", tasks, "SLURM_LOCALID")
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
        master = environment.get("MASTER_ADDR") or first_node(nodes)
        port = environment.get("MASTER_PORT") or str(_slurm_port(environment))
    else:
        return Place()
    rank, world = _number(environment, names[0], 0), _number(environment, names[1], 1)
    if not rank < world:
        raise ConfigError(names[0], rank, f"below {names[1]}={world}", _FIX)
    if world == 1:
        return Place()
    local = _number(environment, names[2], 0) if names[2] in environment else 0
    if not master:
        allowed = "the host name of rank 0, which the launcher sets"
        raise ConfigError("MASTER_ADDR", master, allowed, _FIX)
    number = int(port) if _is_number(port) else 0
    if port and not 0 < number < 2**16:
        raise ConfigError("MASTER_PORT", port, "a port of that host, 1 to 65535", _FIX)
    return Place(rank, world, local, master, number or PORT)


_FIX = "Start with torchrun or srun, which set it, or unset RANK and WORLD_SIZE for one process."


def first_node(nodes: str) -> str:
    """The first host of a Slurm node list: ``n07`` of ``n[07-12,15],x1``."""
    head = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert head is not None
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", head.group())


def _is_slurm_task(environment: Mapping[str, str]) -> bool:
    step = environment.get("SLURM_STEP_ID", "")
    is_step = step.isdecimal() and int(step) < FIRST_RESERVED_STEP
    return is_step and "SLURM_PROCID" in environment


def _slurm_port(environment: Mapping[str, str]) -> int:
    """A port that all tasks of a step know and other steps hardly share.

    The port is below 32768: the ports above are the system's own to hand out.
    """
    job, step = (environment.get(f"SLURM_{name}_ID", "") for name in ("JOB", "STEP"))
    numbers = [int(text) if text.isdecimal() else 0 for text in (job, step)]
    return 20000 + (numbers[0] + 101 * numbers[1]) % 12000


def _number(environment: Mapping[str, str], name: str, least: int) -> int:
    text = environment.get(name, "")
    if not (_is_number(text) and int(text) >= least):
        raise ConfigError(name, text or None, f"a whole number from {least}", _FIX)
    return int(text)


def _is_number(text: str) -> bool:
    """Whether ``text`` is digits alone; ``int`` would also take "1_000", " 1" and other scripts."""
    return text.isascii() and text.isdecimal() and len(text) < 10
