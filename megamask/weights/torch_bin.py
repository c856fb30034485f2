"""PyTorch files (``pytorch_model.bin``, masks of other tools), read as tensors alone.

Such a file is a pickle, and a pickle can have any function called. ``torch.load`` with
``weights_only`` admits the functions that rebuild tensors and refuses all others by name, before
anything is called. The tensors stay on disk: the file is mapped, except in the format before
PyTorch 1.6, which has to be read whole.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamask.errors import ArtifactError, printable
from megamask.file_kinds import require_file
from megamask.machine_errors import explained

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
KIND = "a PyTorch file of tensors"
SAFE = "Use a copy with .safetensors files, from somebody you trust."


class TorchFile:
    """The tensors of a file, by name, with the methods of safetensors' ``safe_open``.

    Args:
        path: the file.
        fix: the action of the user, for the messages.
        safe: the action of the user where the file asks for code to be run.

    Raises:
        ArtifactError: the file is missing or torn, holds something else than tensors by name, or
            asks for code to be run.
        MegamaskError: the machine does not let it be read, or lacks the memory.
    """

    def __init__(self, path: Path, fix: str, safe: str = SAFE) -> None:
        self._tensors = _read(path, fix, safe)

    def keys(self) -> list[str]:
        """The names of the tensors."""
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        """A whole tensor."""
        return self._tensors[name]

    def get_slice(self, name: str) -> TensorSlice:
        """A tensor of which blocks are read."""
        return TensorSlice(self._tensors[name])


class TensorSlice:
    """A tensor on disk, with the methods of a slice of safetensors."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self._tensor.shape)

    def __getitem__(self, block: Any) -> Tensor:
        """A block of it."""
        return self._tensor[block]


def read_tensor(path: Path, fix: str, safe: str = SAFE) -> Tensor:
    """The tensor of a file that holds one tensor and nothing else.

    Args:
        path: the file.
        fix: the action of the user, for the messages.
        safe: the action of the user where the file asks for code to be run.

    Raises:
        ArtifactError, MegamaskError: as ``TorchFile``.
    """
    held = _load(path, fix, safe)
    if not _is_plain(held):
        raise ArtifactError(path, f"holds {type(held).__name__}, not a plain tensor", fix)
    tensor: Tensor = held
    return tensor


def _read(path: Path, fix: str, safe: str) -> dict[str, Tensor]:
    held = _load(path, fix, safe)
    if not isinstance(held, dict):
        raise ArtifactError(path, f"holds {type(held).__name__}, not tensors by name", fix)
    for name, tensor in held.items():
        if not isinstance(name, str) or not _is_plain(tensor):
            what = printable(str(name))[:80]
            raise ArtifactError(path, f"holds something else than a plain tensor at {what}", fix)
    return dict(held)


def _load(path: Path, fix: str, safe: str) -> Any:
    """What a file holds: tensors, and plain numbers, texts, lists and dictionaries."""
    require_file(path, KIND, fix)
    try:
        return torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        problem = f"is not opened, for it asks for more than tensors ({_first_line(error)})"
        raise ArtifactError(path, problem, safe) from error
    except Exception as error:  # torch raises errors of many types over bytes that it cannot read
        problem = f"is torn or not {KIND} ({_first_line(error)})"
        raise explained(error) or ArtifactError(path, problem, fix) from error


def _is_plain(tensor: Any) -> bool:
    return (
        isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and not tensor.is_quantized
        and tensor.device.type == "cpu"
    )


def _first_line(error: Exception) -> str:
    """The name that a pickle asked for, or else the first line of the message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "Unsupported" in line or "GLOBAL" in line]
    return printable((named or lines or [type(error).__name__])[0][:200])
