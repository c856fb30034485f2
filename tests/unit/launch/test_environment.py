"""What the shell scripts do before there is an environment: half-made ones, wrong paths."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[3]


def shell(command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=REPO,
    )


def test_a_half_made_environment_is_made_again(tmp_path: Path) -> None:
    """A Python without ensurepip leaves a folder with a python and no pip."""
    venv, python = tmp_path / "a venv", tmp_path / "python3"
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'if [ -e "{tmp_path}/repaired" ] || [ "$2" != venv ]; then\n'
        f'    exec "{sys.executable}" "$@"\n'
        "fi\n"
        f'"{sys.executable}" "$@" --without-pip && echo "ensurepip is not available" >&2; exit 1\n'
    )
    python.chmod(0o755)
    # the installation itself is left out: a pip that installs nothing
    command = 'source launch/env.sh; retry() { echo "pip of $2"; "$2" -m pip --version; }; '
    given = {"VENV": str(venv), "PYTHON": str(python), "CI": "true"}
    failed = shell(f"{command} megamask_env gguf", **given)
    assert failed.returncode == 2 and "install python3-venv" in failed.stderr
    assert (venv / "bin" / "python").exists() and "pip of" not in failed.stdout
    (tmp_path / "repaired").touch()
    done = shell(f"{command} megamask_env gguf", **given)
    assert done.returncode == 0, done.stderr
    assert f"pip of {venv}/bin/python" in done.stdout and "environment ready" in done.stdout
    assert "making" not in shell(f"{command} megamask_env gguf", **given).stdout


def test_a_gguf_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    """Another model would be downloaded to its name, and measured under it."""
    given = {"GGUF": str(tmp_path / "mine.gguf"), "RUN_DIR": str(tmp_path / "run")}
    done = shell("./launch/quickstart.sh", **given)
    assert done.returncode == 2 and f"GGUF={tmp_path}/mine.gguf is missing" in done.stderr
