"""A checkpoint that a process of its own writes while this process goes on.

Megatron-Core copies tensors of a GPU to the host and forks a writer (``AsyncCallsQueue``). Tensors
of a CPU are shared with the writer until this process changes them, page by page.
"""

from __future__ import annotations

import os
import pickle
import queue
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from megamask import storage
from megamask.model.checkpoint import deaf_helpers, telling
from megamask.parallel.megatron_versions import request_save, results_go_through
from megamask.parallel.mesh import Mesh
from megamask.process.children import die_with
from megamask.safe_checkpoint import NOTE, settle_index


class BackgroundSave:
    """At most one checkpoint that is being written.

    All ranks must call every method.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self._queue = mesh, AsyncCallsQueue()
        self._pending: tuple[Path, Path] | None = None  # where it goes, and where it is written

    def start(
        self, state: dict[str, Any], path: Path, note: dict[str, Any], done: Callable[[], None]
    ) -> None:
        """Begin to save a sharded state and a JSON note as the folder ``path``.

        The folder is written under a temporary name, and renamed by the call of ``proceed`` that
        finds it complete; then the main rank calls ``done``.

        Raises:
            ArtifactError: the disk is full, or ``path`` cannot be written.
        """
        assert self._pending is None
        target, temporary = storage.places(path)
        temporary = Path(self.mesh.from_main(str(temporary)))
        self._pending = path, temporary

        def commit() -> None:
            if self.mesh.is_main:
                settle_index(temporary)
                storage.write_json(temporary / NOTE, note)
                storage.commit_dir(temporary, target)
                done()
            self.mesh.barrier()

        with telling(path, temporary):
            try:
                if self.mesh.is_main:
                    temporary.mkdir(parents=True)
                self.mesh.barrier()
                with deaf_helpers(), results_go_through(ResultsFile):
                    request = request_save(state, temporary)
                    request.add_finalize_fn(commit)
                    write = request.async_fn  # None on a rank that has nothing to write
                    if write is not None:
                        request = request._replace(async_fn=partial(_as_child, write, os.getpid()))
                    self._queue.schedule_async_request(request)
            except BaseException:
                self.abandon()
                raise

    def proceed(self, wait: bool = False) -> bool:
        """Rename the checkpoint if all ranks have written their part; with ``wait``, wait for it.

        Returns:
            Whether no checkpoint is being written now.

        Raises:
            ArtifactError: the disk is full, or the checkpoint cannot be written.
        """
        if self._pending is None:
            return True
        path, temporary = self._pending
        try:
            with telling(path, temporary):
                if self._queue.maybe_finalize_async_calls(blocking=wait):
                    self._pending = None
        except BaseException:
            self.abandon()
            raise
        return self._pending is None

    def abandon(self) -> None:
        """Kill this rank's writer, and delete what is written. Other ranks need not call this."""
        for call in self._queue.async_calls:
            call.async_caller.close(abort=True)
        self._queue.async_calls.clear()
        if self._pending and self.mesh.is_main:
            shutil.rmtree(self._pending[1], ignore_errors=True)
        self._pending = None


class ResultsFile:
    """What a forked writer tells its parent, in a file without a name that both have open.

    A pipe would hold some kilobytes only, and a writer could not end before they are read.
    """

    def __init__(self) -> None:
        # Both processes use it, and it is closed with the last of them.
        self._file = tempfile.TemporaryFile()  # noqa: SIM115

    def put(self, results: Any) -> None:
        """Write the results."""
        self._file.write(pickle.dumps(results))
        self._file.flush()

    def get_nowait(self) -> Any:
        """Read the results.

        Raises:
            queue.Empty: there are none.
        """
        self._file.seek(0)
        content = self._file.read()
        if not content:
            raise queue.Empty
        return pickle.loads(content)


def _as_child(write: Callable[..., None], parent: int, *args: Any, **kwargs: Any) -> None:
    """``write`` in a forked process that does not outlive its parent, nor do those that it forks: a
    writer that is left alone would hold the locks of a run that was killed.
    """
    die_with(parent)
    os.register_at_fork(after_in_child=partial(die_with, os.getpid()))
    write(*args, **kwargs)
