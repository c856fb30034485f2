"""Kernels compiled without a GPU, through the product's call sites."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.move_cache import move_cache

REPO = Path(__file__).resolve().parents[3]
PROGRAM = "benchmarks.gpu.compile_kernels"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def compile_into(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        **{"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"},
    }
    command = [sys.executable, "-m", PROGRAM, "--masks", "subset/2:4", "--models"]
    return subprocess.run(
        command, env=environment, cwd=REPO, capture_output=True, text=True, timeout=300
    )


def pack(cache: Path, into: Path) -> None:
    """Copy what pack.sh copies, and leave nothing at the first place."""
    for path in cache.rglob("*"):
        if path.suffix in (".cubin", ".json"):
            target = into / path.relative_to(cache)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    shutil.rmtree(cache)


@pytest.mark.nightly  # test_triton.py compiles the kernels always
@pytest.mark.slow
def test_compiled_kernels_are_found_again_in_another_folder(tmp_path: Path) -> None:
    """The second call compiles nothing new in a copied cache, so a cache that travels is used."""
    first = compile_into(tmp_path / "one")
    assert first.returncode == 0, first.stderr[-3000:]
    count = int(first.stdout.splitlines()[-1].split()[0])  # "N kernels for sm_90 in S s"
    assert count == len(list((tmp_path / "one").rglob("*.cubin"))) > 0
    other = tmp_path / "other"
    pack(tmp_path / "one", other)
    assert move_cache(other) == count
    before = {path: path.stat().st_mtime_ns for path in other.rglob("*.cubin")}
    second = compile_into(other)
    assert second.returncode == 0, second.stderr[-3000:]
    after = {path: path.stat().st_mtime_ns for path in other.rglob("*.cubin")}
    assert after == before


def test_a_copied_cache_is_empty_to_triton_until_its_lists_are_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.cache import FileCacheManager

    one, other = tmp_path / "one", tmp_path / "other"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(one))
    made = FileCacheManager("KEY")
    files = {name: made.put(b"made", name) for name in ("k.json", "k.cubin", "k.ptx")}
    made.put_group("k.json", files)
    pack(one, other)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(other))
    assert not FileCacheManager("KEY").get_group("k.json")
    assert move_cache(other) == 1
    assert FileCacheManager("KEY").get_group("k.json") == {
        name: str(other / "KEY" / name) for name in ("k.json", "k.cubin")
    }
    (other / "KEY" / "k.cubin").unlink()
    assert move_cache(other) == 0
