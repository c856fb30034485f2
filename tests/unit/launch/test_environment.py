"""What the shell scripts do before there is an environment: half-made ones, wrong paths."""

from __future__ import annotations

import os
import shutil
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


def test_an_environment_of_another_python_is_made_again(tmp_path: Path) -> None:
    """Where the user names one; its packages went into the old one without a word."""
    venv, other = tmp_path / "venv", tmp_path / "other"
    other.write_text(
        "#!/usr/bin/env bash\n"
        f'if [ "$*" = -VV ]; then echo "Python 3.99.0"; else exec "{sys.executable}" "$@"; fi\n'
    )
    other.chmod(0o755)
    command = 'source launch/env.sh; retry() { "$2" -m pip --version; }; megamask_env gguf'
    said = [
        shell(command, VENV=str(venv), CI="true", PYTHON=python).stdout
        for python in (sys.executable, "", sys.executable, str(other))
    ]
    assert ["making" in one for one in said] == [True, False, False, True]


def test_packages_of_pins_before_are_installed_again(tmp_path: Path) -> None:
    """One environment for two states of the repository, there and back; and for two extras."""
    folder = tmp_path / "repo" / "launch"
    folder.mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt", "launch/env.sh"):
        shutil.copy(REPO / name, tmp_path / "repo" / name)
    pins = tmp_path / "repo" / "constraints.txt"
    command = f"source {tmp_path}/repo/launch/env.sh; retry() {{ echo installed; }}; megamask_env "

    def is_installed(text: str, extras: str) -> bool:
        pins.write_text(text)
        given = {"VENV": str(tmp_path / "venv"), "CI": "true", "PYTHON": sys.executable}
        done = shell(command + extras, **given)
        assert done.returncode == 0, done.stderr
        return "installed" in done.stdout

    asked = [("one", "dev"), ("one", "dev"), ("one", "gguf"), ("one", "dev")]
    asked += [("two", "dev"), ("one", "gguf"), ("one", "gguf"), ("one", "dev")]
    found = [is_installed(*one) for one in asked]
    assert found == [True, False, True, False, True, True, False, True]


def test_a_gguf_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    """Another model would be downloaded to its name, and measured under it."""
    given = {"GGUF": str(tmp_path / "mine.gguf"), "RUN_DIR": str(tmp_path / "run")}
    done = shell("./launch/quickstart.sh", **given)
    assert done.returncode == 2 and f"GGUF={tmp_path}/mine.gguf is missing" in done.stderr
