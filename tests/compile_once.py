"""Processes side by side compile a kernel once: one compiles, the others wait and read its file.

numba looks into its cache before it compiles, so each of several processes that meet a new kernel
at the same time would compile it, for up to ten seconds. They would also write the index of the
kernel at the same time, and what one of them had added would be lost.
"""

# numba is not typed
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numba.core.compiler_lock import global_compiler_lock
from numba.core.dispatcher import Dispatcher


def compile_once() -> None:
    """Let every kernel of this process and of its forks wait for other processes' compilation."""
    compile_here = Dispatcher.compile
    if hasattr(compile_here, "__wrapped__"):
        return

    def compile_alone(self: Any, signature: Any) -> Any:
        # numba's own lock comes first: two threads of a process do not hold the two in turn.
        with global_compiler_lock, _alone(self._cache.cache_path, self.py_func.__name__):
            return compile_here(self, signature)

    compile_alone.__wrapped__ = compile_here  # type: ignore[attr-defined]
    Dispatcher.compile = compile_alone  # type: ignore[method-assign, assignment]


@contextlib.contextmanager
def _alone(folder: str | None, kernel: str) -> Iterator[None]:
    """Hold the lock of a kernel among the processes that share a cache folder; without a folder,
    the kernel is not cached and nobody waits.
    """
    if folder is None:
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    with (Path(folder) / f"{kernel}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
