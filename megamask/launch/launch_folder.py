"""The folders ``run_dir/launch/NNN``, one for each submitted job: its code, settings and logs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import megamask
from megamask.config import Config
from megamask.config.yaml_text import write_yaml
from megamask.errors import ArtifactError
from megamask.process.holder import Holder, utc_now
from megamask.shipped import COMMIT_FILE, shipped, source_commit
from megamask.storage import read_json, real_path, write_json

NOTE = "job.json"
SCRIPTS = ("env.sh", "learn.sh", "learn.sbatch")
MAIN = '''"""Runs the copy of megamask beside this file."""

import runpy

runpy.run_module("megamask", run_name="__main__", alter_sys=True)
'''
# Environment variables that change how a job runs. The others may hold secrets.
PREFIXES = ("CUDA_", "GLOO_", "KMP_", "NCCL_", "NUMBA_", "OMP_", "SBATCH_", "TORCH", "TRITON_")


@dataclass(frozen=True)
class Launch:
    """A job that was started.

    Attributes:
        folder: of the job.
        verb: what the job runs.
        job: number of the Slurm job; None under torchrun.
        process: the process of torchrun; None under Slurm.
        time: of the submission, UTC, in ISO form.
    """

    folder: Path
    verb: str
    job: str | None
    process: Holder | None
    time: str

    @classmethod
    def read(cls, folder: Path) -> Launch | None:
        """From the note in ``folder``; None where there is none that can be read."""
        try:
            note = read_json(folder / NOTE, "")
        except ArtifactError:
            return None
        if not isinstance(note, dict):
            return None
        job, process = note.get("job"), Holder.read(note.get("process"))
        words = [note.get("verb"), note.get("time")]
        if not all(isinstance(word, str) for word in words) or (job is None) == (process is None):
            return None
        return cls(folder, str(words[0]), None if job is None else str(job), process, str(words[1]))

    def is_running(self) -> bool:
        """Whether its torchrun runs on this machine; the queue tells of jobs."""
        return bool(self.process and self.process.is_here() and self.process.is_running())

    def write(self) -> None:
        """Write the note into the folder."""
        process = asdict(self.process) if self.process else None
        note = {"verb": self.verb, "job": self.job, "process": process, "time": self.time}
        write_json(self.folder / NOTE, note)


def launches(run_dir: Path) -> list[Launch]:
    """The jobs of a run that were started, in order."""
    found = (Launch.read(folder) for folder in _folders(run_dir))
    return [launch for launch in found if launch is not None]


def next_folder(run_dir: Path) -> Path:
    """The folder of the next job, absolute, which does not exist yet."""
    folders = _folders(run_dir)
    number = int(folders[-1].name) + 1 if folders else 1
    return real_path(run_dir) / "launch" / f"{number:03d}"


def withdraw(folder: Path) -> None:
    """Remove the folder of a job that does not exist, and ``launch`` if it was the first."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # other jobs have folders there
        folder.parent.rmdir()


def _folders(run_dir: Path) -> list[Path]:
    folders = (run_dir / "launch").glob("*")
    return sorted((one for one in folders if one.name.isdecimal()), key=lambda one: int(one.name))


def fill(folder: Path, config: Config, script_name: str, script: str) -> None:
    """Write everything that the job needs, and everything that tells later how it was started.

    The package is copied, so that a job that is queued again runs the code that it began with.
    """
    code = folder / "code"
    package = Path(megamask.__file__).resolve().parent
    ignored = shutil.ignore_patterns("__pycache__", "shipped_files")
    shutil.copytree(package, code / "megamask", ignore=ignored)
    (code / "__main__.py").write_text(MAIN)
    (code / COMMIT_FILE).write_text(f"{source_commit() or ''}\n")
    (code / "launch").mkdir()
    for name in SCRIPTS:
        shutil.copy(shipped("launch") / name, code / "launch" / name)
    (folder / "recipe.yaml").write_text(recipe_text(config), encoding="utf-8")
    (folder / "env.txt").write_text("\n".join(environment()) + "\n", encoding="utf-8")
    path = folder / script_name
    path.write_text(script, encoding="utf-8")
    path.chmod(0o755)


def recipe_text(config: Config) -> str:
    """The settings that were given, as a recipe; the rest are defaults of the copied code."""
    values: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    return write_yaml(values)


def environment() -> list[str]:
    """What a job is started from: versions, packages and variables that matter."""
    packages = {one.metadata["Name"]: one.version for one in importlib.metadata.distributions()}
    variables = [key for key in sorted(os.environ) if key.startswith(PREFIXES)]
    return [
        f"time {utc_now()}",
        f"host {platform.node()}",
        f"folder {Path.cwd()}",
        f"megamask {megamask.__version__}, commit {source_commit() or 'unknown'}",
        f"python {platform.python_version()} {sys.executable}",
        *(f"variable {key}={os.environ[key]}" for key in variables),
        *(f"package {name}=={packages[name]}" for name in sorted(packages, key=str)),
    ]
