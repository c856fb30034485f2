"""A PyTorch file that the machine does not let be read: the machine is named, not the download."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megamask.errors import ArtifactError, MegamaskError
from megamask.weights.torch_bin import TorchFile


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "x.bin"), "Permission denied"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "x.bin"), "ulimit -n"),
        (MemoryError(), "memory does not hold"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "memory does"),
    ],
)
def test_the_machine_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(2)}, path)
    whole = path.read_bytes()
    assert TorchFile(path, "Download it again.").keys() == ["a"]

    def fails(*words: Any, **more: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", fails)
        with pytest.raises(MegamaskError, match=said) as caught:
            TorchFile(path, "Download it again.")
    assert "Download" not in str(caught.value) and "torn" not in str(caught.value)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match=r"is torn.*Download it again"):
        TorchFile(path, "Download it again.")
