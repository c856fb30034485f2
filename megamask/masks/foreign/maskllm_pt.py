"""MaskLLM's masks before they are packed: a PyTorch file of tensors ``NAME.weight.mask`` (O, I) of
zeros and ones, fp32 as ``tool_compute_mask_hf.py`` of NVlabs/MaskLLM writes them.

The file is mapped, so a tensor at a time is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from megamask.masks.foreign.kind import FIX, SAFE, Base, Kind, checked_mask
from megamask.masks.foreign.maskllm_npz import ENDING, linears_named
from megamask.weights.torch_bin import TorchFile


def read(path: Path, base: Base) -> Iterator[tuple[str, Tensor]]:
    """The masks of a file. The arguments and errors are those of ``Kind.read``."""
    file = TorchFile(path, FIX, SAFE)
    for name in linears_named(path, file.keys(), base):
        yield name, checked_mask(path, name, file.get_tensor(f"{name}{ENDING}"), base)


KIND = Kind(
    "maskllm",
    "a .pt file of MaskLLM's masks",
    lambda path: path.suffix in (".pt", ".pth"),
    read,
)
