"""Another version of Megatron-Core is refused by name, before anything of Megatron runs."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from megamask import megatron_range
from megamask.errors import ConfigError
from megamask.megatron_range import RANGE, check_megatron, installed_version

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("version", "is_fine"),
    [
        ("0.16.1", True),
        ("0.16.0rc0", True),
        ("0.16.1+nv25.11", True),
        ("0.15.2", False),
        ("0.14.0", False),
        ("0.17.1", True),
        ("0.18.2", True),
        ("0.19.2", True),
        ("0.20.0", False),
        ("1.16.0", False),
        ("main", False),
        (None, False),
    ],
)
def test_versions(version: str | None, is_fine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_range, "installed_version", lambda: version)
    if is_fine:
        check_megatron()
        return
    with pytest.raises(ConfigError) as refused:
        check_megatron()
    wanted = f"megatron-core = {version!r}: a version {RANGE}. pip install 'megatron-core{RANGE}'."
    assert str(refused.value) == wanted


def test_a_source_tree_on_the_path_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    known = installed_version()

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert installed_version() == known


def test_the_range_of_the_package_is_the_range_of_the_check() -> None:
    found = re.search(r'"megatron-core(\S+)",', (REPO / "pyproject.toml").read_text())
    assert found and found[1] == RANGE


def test_a_verb_refuses_another_version_in_one_message() -> None:
    script = (
        "from importlib import metadata; real = metadata.version\n"
        "metadata.version = lambda name: '0.15.2' if name == 'megatron-core' else real(name)\n"
        "import sys; from megamask.__main__ import main\n"
        "sys.exit(main(['plan', '--model', 'llama2-7b']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("megamask: error: megatron-core = '0.15.2'"), done.stderr
    assert "Traceback" not in done.stderr
