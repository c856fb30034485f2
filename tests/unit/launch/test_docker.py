"""The Dockerfile and its page, as far as they can be checked without the base image."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from megamask.config.recipes import recipes
from megamask.verbs.table import VERBS

REPO = Path(__file__).resolve().parents[3]
DOCKERFILE = (REPO / "docker/Dockerfile").read_text()
# A Python without the packages of the tests: that of a virtual environment's maker.
BARE = getattr(sys, "_base_executable", sys.executable)
PAGE = (REPO / "docker/README.md").read_text()


def test_every_copied_file_exists_and_the_build_needs_no_other() -> None:
    copied = [
        source
        for line in re.findall(r"(?m)^COPY (.*)$", DOCKERFILE)
        for source in line.split()[:-1]
    ]
    assert all((REPO / source).exists() for source in copied)
    assert {"setup.py", "pyproject.toml", "constraints.txt", "README.md", "megamask"} <= set(copied)
    ignored = (REPO / ".dockerignore").read_text().split()
    assert not set(copied) & set(ignored)


def test_the_image_pins_what_the_base_lacks(tmp_path: Path) -> None:
    """Megatron-Core above all: the newest for Python 3.12 is another than the code was read for."""
    assert "write_constraints /tmp/constraints.txt" in DOCKERFILE
    assert "-c /tmp/constraints.txt" in DOCKERFILE
    target = tmp_path / "constraints.txt"
    script = f"source launch/env.sh; write_constraints {target} 2.9.0a0+nv"
    environment = {"PYTHON": BARE, "PATH": "/usr/bin:/bin"}
    subprocess.run(["bash", "-c", script], cwd=REPO, env=environment, check=True, timeout=60)
    lines = target.read_text().splitlines()
    assert "torch==2.9.0a0+nv" in lines
    assert [line for line in lines if line.startswith("torch==")] == ["torch==2.9.0a0+nv"]
    assert any(line.startswith("megatron-core==0.16.1") for line in lines)


def test_a_torch_of_the_host_is_pinned_as_its_package_is_called(tmp_path: Path) -> None:
    """A wheel of the index is 2.11.0 to pip, and 2.11.0+cu130 to itself: pip finds no such one."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(
        "class version: cuda = '13.0'\n__version__ = '2.11.0+cu130'\n"
    )
    (tmp_path / "torch-2.11.0.dist-info").mkdir()
    (tmp_path / "torch-2.11.0.dist-info/METADATA").write_text("Name: torch\nVersion: 2.11.0\n")

    def host_torch() -> str:
        environment = {
            "PYTHON": BARE,
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(tmp_path),
        }
        script = ["bash", "-c", "source launch/env.sh; host_torch || true"]
        done = subprocess.run(
            script, cwd=REPO, env=environment, check=True, timeout=60, capture_output=True
        )
        return done.stdout.decode().strip()

    assert host_torch() == "2.11.0"
    (tmp_path / "torch/__init__.py").write_text("class version: cuda = None\n")
    assert host_torch() == ""  # of no use on a GPU


def test_the_commands_of_the_page_are_real() -> None:
    verbs = re.findall(r"megamask (?:exec .* )?([a-z]+) --(?:config|model)", PAGE)
    assert len(verbs) >= 3 and set(verbs) <= set(VERBS)
    for script in re.findall(r"--entrypoint (\S+)", PAGE):
        assert (REPO / script).exists()
    named = re.findall(r"--config ([\w-]+) ", PAGE)
    assert named and set(named) <= set(recipes())
