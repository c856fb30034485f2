"""The wheel, built by way of the source distribution and used away from the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SOURCES = (
    *("setup.py", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"),
    *("megamask", "configs", "launch"),
)
BUILD = "from setuptools import build_meta; build_meta.build_{}({!r})"


def build(kind: str, folder: Path, out: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", BUILD.format(kind, str(out))],
        cwd=folder,
        check=True,
        capture_output=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that holds what an installation of the wheel would hold."""
    root = tmp_path_factory.mktemp("packaging")
    clone = root / "clone"
    clone.mkdir()
    for name in SOURCES:
        source = REPO / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, clone / name, ignore=ignored)
        else:
            shutil.copy(source, clone / name)
    build("sdist", clone, root)
    with tarfile.open(next(root.glob("*.tar.gz"))) as archive:
        archive.extractall(root / "sdist", filter="data")
    build("wheel", next((root / "sdist").iterdir()), root)
    with zipfile.ZipFile(next(root.glob("*.whl"))) as archive:
        archive.extractall(root / "site")
    yield root / "site"


def installed(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megamask", *words],
        cwd=site.parent,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_wheel_carries_what_stands_beside_the_package(site: Path) -> None:
    carried = site / "megamask/shipped_files"
    for source in [
        *(REPO / "configs").rglob("*.yaml"),
        *(REPO / "configs").rglob("*.json"),
        *(REPO / "launch").glob("learn.*"),
        REPO / "constraints.txt",
    ]:
        copy = carried / source.relative_to(REPO)
        assert copy.read_bytes() == source.read_bytes()
    assert {path.parts[0] for path in (one.relative_to(site) for one in site.iterdir())} == {
        "megamask",
        f"megamask-{__import__('megamask').__version__}.dist-info",
    }


def test_an_installed_user_lists_reads_and_uses_recipes(site: Path) -> None:
    listed = installed(site, "recipes")
    assert listed.returncode == 0, listed.stderr
    assert {line.split()[0] for line in listed.stdout.splitlines()} == {
        path.stem for path in (REPO / "configs/recipes").glob("*.yaml")
    }
    text = (REPO / "configs/recipes/quickstart.yaml").read_text()
    assert installed(site, "recipes", "quickstart").stdout == text
    shown = installed(site, "tokenize", "--config", "quickstart", "--dry-run")
    assert shown.returncode == 0 and "run_dir: runs/quickstart" in shown.stdout


def test_help_names_no_file_of_the_repository(site: Path) -> None:
    """An installed user has no configs/, docs/ or launch/ to look into."""
    from megamask.verbs.table import VERBS

    code = """
import sys
from megamask.__main__ import main
main(['--help'])
for verb in sys.argv[1:]: main([verb, '-h'])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *VERBS],
        cwd=site.parent,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "usage: megamask learn" in done.stdout
    for folder in ("configs/", "launch/", "megamask/", "benchmarks/"):
        assert folder not in done.stdout.replace("{run_dir}/", "")
