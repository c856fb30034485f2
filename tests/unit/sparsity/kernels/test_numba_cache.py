"""Compiled kernels are not taken for those of sources that have changed since."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from megamask.sparsity.categorical import gumbel_softmax_numba
from megamask.sparsity.kernels import numba_math
from megamask.sparsity.kernels.numba_math import cache_folder

PKG = numba_math.PACKAGE


@pytest.mark.parametrize("name", ["numba_math.py", "llvm_polynomials.py", "k_subset_numba.py"])
def test_a_change_in_any_source_asks_for_another_folder(tmp_path: Path, name: str) -> None:
    for pattern in numba_math.SOURCES:
        for path in PKG.rglob(pattern):
            shutil.copy(path, tmp_path)
    before = cache_folder(tmp_path)
    assert cache_folder(tmp_path) == before
    (tmp_path / name).write_text((tmp_path / name).read_text() + "\n# changed\n")
    assert cache_folder(tmp_path) != before


def test_every_module_with_a_kernel_is_counted() -> None:
    counted = {path.name for pattern in numba_math.SOURCES for path in PKG.rglob(pattern)}
    assert {path.name for path in PKG.rglob("*.py") if "njit" in path.read_text()} <= counted


@pytest.mark.skipif("NUMBA_CACHE_DIR" in os.environ, reason="numba has been given another folder")
def test_numba_keeps_kernels_there() -> None:
    assert str(cache_folder(PKG)) in gumbel_softmax_numba.mask_statistics._cache.cache_path
