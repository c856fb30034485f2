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


def stand_in(path: Path, version: str) -> str:
    """A Python that answers what env.sh asks in no time; its environment holds a copy of it."""
    path.write_text(
        "#!/usr/bin/env bash\n"
        f'case "$*" in -V | -VV) echo "Python {version}" ;;\n'
        '*venv*) mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python" ;; esac\n'
    )
    path.chmod(0o755)
    return str(path)


def test_an_environment_of_another_python_is_made_again(tmp_path: Path) -> None:
    """Where the user names one; its packages went into the old one without a word."""
    one, other = (stand_in(tmp_path / name, name) for name in ("3.11.7", "3.12.1"))
    stand_in(tmp_path / "python3", "3.13.0")  # the default: it leaves the environment as it is
    path = f"{tmp_path}:{os.environ['PATH']}"
    command = 'source launch/env.sh; retry() { echo "pip of $("$2" -V)"; }; megamask_env gguf'
    said = [
        shell(command, VENV=str(tmp_path / "venv"), PATH=path, PYTHON=python).stdout
        for python in (one, "", one, other, other)
    ]
    assert ["making" in line for line in said] == [True, False, False, True, False]
    assert "pip of Python 3.11.7" in said[1] and "pip of Python 3.12.1" in said[3]
    assert "pip" not in said[4]


def test_packages_of_pins_before_are_installed_again(tmp_path: Path) -> None:
    """One environment for two states of the repository, there and back; and for two extras."""
    folder = tmp_path / "repo"
    (folder / "launch").mkdir(parents=True)
    for name in ("pyproject.toml", "launch/env.sh"):
        shutil.copy(REPO / name, folder / name)
    python = stand_in(tmp_path / "python", "3.11.7")
    command = f"source {folder}/launch/env.sh; retry() {{ echo installed; }}; megamask_env "

    def is_installed(pins: str, extras: str) -> bool:
        (folder / "constraints.txt").write_text(pins)
        done = shell(command + extras, VENV=str(tmp_path / "venv"), PYTHON=python)
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
