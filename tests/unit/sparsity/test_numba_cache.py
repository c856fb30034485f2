"""Compiled kernels are not taken for those of sources that have changed since."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megamask.sparsity import numba_math
from megamask.sparsity.numba_math import cache_folder

HERE = Path(numba_math.__file__).parent


@pytest.mark.parametrize("name", ["numba_math.py", "subset_blocks.py", "kernels_numba_linear.py"])
def test_a_change_in_any_source_asks_for_another_folder(tmp_path: Path, name: str) -> None:
    for pattern in numba_math.SOURCES:
        for path in HERE.glob(pattern):
            shutil.copy(path, tmp_path)
    before = cache_folder(tmp_path)
    assert cache_folder(tmp_path) == before
    (tmp_path / name).write_text((tmp_path / name).read_text() + "\n# changed\n")
    assert cache_folder(tmp_path) != before


def test_every_module_with_a_kernel_is_counted() -> None:
    counted = {path.name for pattern in numba_math.SOURCES for path in HERE.glob(pattern)}
    assert {path.name for path in HERE.glob("*.py") if "njit" in path.read_text()} <= counted


def test_numba_keeps_kernels_there() -> None:
    code = "from megamask.sparsity import kernels_numba; print(kernels_numba.survey._cache.cache_path)"
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120, env={"PATH": "", "HOME": "/"}
    )
    assert str(cache_folder(HERE)) in child.stdout
