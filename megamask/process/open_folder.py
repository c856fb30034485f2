"""A folder that is read while another process may replace it."""

from __future__ import annotations

import contextlib
import os
import weakref
from pathlib import Path
from typing import BinaryIO

from megamask.errors import ArtifactError


class OpenFolder:
    """A folder that is read, whatever its name becomes: a writer replaces a folder by renaming a
    new one to its name. One that cannot be opened is read by its name.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._descriptor = folder, -1
        with contextlib.suppress(OSError):
            self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            weakref.finalize(self, os.close, self._descriptor)

    def require_there(self) -> None:
        """Check that the folder still has its name.

        Raises:
            ArtifactError: the name is that of another folder, or of none.
        """
        if self._descriptor < 0:
            return
        try:
            if os.path.samestat(os.stat(self._folder), os.fstat(self._descriptor)):
                return
        except FileNotFoundError:
            pass
        problem = "was replaced by another process while it was read"
        raise ArtifactError(self._folder, problem, "Start again when that process has ended.")

    def open(self, name: str) -> BinaryIO:
        """A file of the folder, to be read."""
        if self._descriptor < 0:
            return (self._folder / name).open("rb")
        return os.fdopen(os.open(name, os.O_RDONLY, dir_fd=self._descriptor), "rb")
