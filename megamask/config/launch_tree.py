"""The settings of the verb submit: where and how a job is started. All of them are free."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from megamask.config.section import HOME, Ranks, Section, free


def _as_text(value: Any) -> Any:
    """A whole number as text: ``time: 60`` means minutes to Slurm."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if is_number else value


def _is(pattern: str, said: str) -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(said)
        return text

    return AfterValidator(check)


# Names go into lines of a job script, which Slurm splits at blanks.
Word = Annotated[
    str, BeforeValidator(_as_text), _is(r"[^\s\"'\\#]+", "a name without blanks, quotes and #")
]
Line = Annotated[str, _is(r"[^\r\n\0]+", "one line of text")]
Time = Annotated[
    str,
    BeforeValidator(_as_text),
    _is(
        r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}",
        "minutes, minutes:seconds, hours:minutes:seconds or days-hours:minutes:seconds",
    ),
]


class LaunchSection(Section):
    """How the verb submit starts a job: under Slurm, or under torchrun on this machine."""

    launcher: Literal["auto", "slurm", "torchrun"] = free(
        "auto", description="auto = slurm where there is the command sbatch"
    )
    nodes: Ranks = free(1, description="number of nodes; torchrun starts on this machine alone")
    processes_per_node: Ranks | None = free(
        None,
        description="processes of a node, each with a GPU of its own unless device=cpu; "
        "null = parallel.tp, so that a node holds a replica",
    )
    cpus_per_process: Ranks | None = free(
        None, description="cores of a process; null = the cluster's default"
    )
    time: Time | None = free(
        None, description="time limit as Slurm reads it: minutes, 24:00:00 or 2-12"
    )
    warning: Annotated[int, Field(ge=60, le=86400)] = free(
        300, description="seconds before the time limit at which a run saves a snapshot"
    )
    account: Word | None = free(None, description="account to charge")
    partition: Word | None = free(None, description="partition, or several with commas")
    qos: Word | None = free(None, description="quality of service")
    sbatch: list[Line] = free(
        default_factory=list, description="more options of sbatch, such as --mem=0"
    )
    setup: Line | None = free(
        None, description="line of bash that every process runs first, such as module load cuda"
    )
    container: Annotated[Line, HOME] | None = free(
        None, description="image for srun --container-image (pyxis and enroot)"
    )
    mounts: list[Annotated[Line, HOME]] = free(
        default_factory=list,
        description="more folders for the container, HOST:INSIDE; the folder of submission and "
        "run_dir are always there",
    )
    retries: Annotated[int, Field(ge=0, le=1000)] = free(
        3,
        description="Slurm: how often in a row a job without a new snapshot is queued again; "
        "torchrun: how often it starts all processes again, whatever ended them",
    )
