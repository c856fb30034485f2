"""Slurm's commands as stand-ins that write down what they are told, and a run folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from megamask.__main__ import main

COMMANDS = {
    "sbatch": 'echo "sbatch $*" >>"$FAKE/calls"; [ ! -e "$FAKE/refuse" ] || '
    "{ echo 'sbatch: error: invalid account' >&2; exit 1; }; echo '41;cluster'",
    "squeue": '[ ! -e "$FAKE/down" ] || { echo "squeue: error: Unable to contact slurm controller" '
    '>&2; exit 1; }; cat "$FAKE/queue" 2>/dev/null || '
    "{ echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1; }",
    "scontrol": 'echo "scontrol $*" >>"$FAKE/calls"',
    "scancel": 'echo "scancel $*" >>"$FAKE/calls"',
}


@dataclass
class Cluster:
    """Slurm's commands, and a run folder."""

    folder: Path
    run_dir: Path

    def queue(self, line: str) -> None:
        (self.folder / "queue").write_text(f"{line}\n" if line else "")

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def submit(self, *words: str) -> int:
        return main(["submit", "tokenize", f"run_dir={self.run_dir}", "device=cpu", *words])


def make_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The stand-ins on the path, and a run folder whose name has blanks and signs."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, body in COMMANDS.items():
        (binaries / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (binaries / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (run_dir := tmp_path / "run 50%").mkdir()
    return Cluster(tmp_path, run_dir)
