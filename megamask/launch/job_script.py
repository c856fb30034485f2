"""The script of a job: a header, variables, and the call of a launch script.

The launch scripts say how a job runs, and are the same as those in ``launch/``.
"""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from megamask.config import Config, run_paths

# Variables of the launch scripts. A script sets or unsets each, so that the environment of the
# submission decides nothing.
VARIABLES = (
    *("VERB", "SETUP", "VENV", "RETRIES", "RESTARTS", "CONTAINER", "MOUNTS"),
    *("SRUN", "NNODES", "NODE_RANK", "NPROC_PER_NODE"),
    *("MASTER_ADDR", "MASTER_PORT", "MASTER_WAIT"),
    *("MEGAMASK_CODE", "MEGAMASK_LEARN", "MEGAMASK_LOGS", "MEGAMASK_PYTHON"),
)


@dataclass(frozen=True)
class Job:
    """A job that is to be started.

    Attributes:
        config: the settings.
        verb: what the job runs.
        folder: of the job, absolute; it holds ``code/`` and ``recipe.yaml``.
        cwd: the folder of submission, absolute, which relative paths in the settings start from.
    """

    config: Config
    verb: str
    folder: Path
    cwd: Path

    @property
    def processes_per_node(self) -> int:
        """Number of processes of a node."""
        return self.config.launch.processes_per_node or self.config.parallel.tp

    @property
    def world(self) -> int:
        """Number of all processes."""
        return self.config.launch.nodes * self.processes_per_node

    @property
    def log(self) -> Path:
        """Output of the script and of rank 0; the other ranks write ``rank-N.log`` beside it."""
        return self.folder / "job.log"

    def slurm_script(self) -> str:
        """The text for sbatch."""
        launch, name = self.config.launch, self.folder.parents[1].name
        options = {
            "job-name": re.sub(r"[^\w.-]", "_", f"megamask-{name}"),
            "nodes": launch.nodes,
            "ntasks-per-node": self.processes_per_node,
            "gpus-per-node": None if self.config.device == "cpu" else self.processes_per_node,
            "cpus-per-task": launch.cpus_per_process,
            "time": launch.time,
            "account": launch.account,
            "partition": launch.partition,
            "qos": launch.qos,
            "signal": f"USR1@{launch.warning}",
            "open-mode": "append",
            "chdir": _quoted(str(self.cwd)),
            "output": _quoted(_escaped(str(self.log))),
        }
        given = [f"--{key}={value}" for key, value in options.items() if value is not None]
        header = [f"#SBATCH {option}" for option in [*given, "--requeue", *launch.sbatch]]
        return self._text(header, self._variables(), "source", "learn.sbatch")

    def torchrun_script(self) -> str:
        """The text for bash, on this machine."""
        own = {
            "NNODES": "1",
            "NPROC_PER_NODE": str(self.processes_per_node),
            "RESTARTS": str(self.config.launch.retries),
        }
        setup = ['if [ -n "${SETUP:-}" ]; then eval "$SETUP"; fi']
        setup.append(f"cd {shlex.quote(str(self.cwd))}")
        return self._text([], {**self._variables(), **own}, "exec bash", "learn.sh", setup)

    def _variables(self) -> dict[str, str | None]:
        launch = self.config.launch
        run_dir = self.folder.parents[1]
        mounts = [f"{path}:{path}" for path in dict.fromkeys([self.cwd, run_dir])]
        is_contained = launch.container is not None
        return {
            "VERB": self.verb,
            "SETUP": launch.setup,
            "RETRIES": str(launch.retries),
            "CONTAINER": launch.container,
            "MOUNTS": ",".join([*mounts, *launch.mounts]) if is_contained else None,
            "MEGAMASK_CODE": str(self.folder / "code"),
            "MEGAMASK_LEARN": str(self.cwd / run_paths(self.config).learn),
            "MEGAMASK_LOGS": str(self.folder),
            "MEGAMASK_PYTHON": None if is_contained else sys.executable,
        }

    def _text(
        self,
        header: list[str],
        variables: dict[str, str | None],
        how: str,
        launch_script: str,
        before: list[str] | None = None,
    ) -> str:
        unset = [name for name in VARIABLES if variables.get(name) is None]
        script = self.folder / "code" / "launch" / launch_script
        words = [shlex.quote(str(path)) for path in (script, self.folder / "recipe.yaml")]
        return "\n".join(
            [
                "#!/usr/bin/env bash",
                *header,
                f"# Written by megamask submit. {launch_script} in code/launch/ says what happens.",
                f"unset {' '.join(unset)}",
                *(
                    f"export {key}={shlex.quote(value)}"
                    for key, value in variables.items()
                    if value
                ),
                *(before or []),
                f"{how} {' '.join(words)}",
                "",
            ]
        )


def _escaped(path: str) -> str:
    """A path for ``--output``, where % starts a pattern."""
    return path.replace("%", "%%")


def _quoted(text: str) -> str:
    """A value in a line of a header: Slurm reads quotes and backslashes as a shell does."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
