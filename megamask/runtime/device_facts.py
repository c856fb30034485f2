"""The device and software that a measured time belongs to."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

LEAST = (8, 0)  # compute capability of the first sparse tensor cores
NEEDS = (
    "2:4 kernels need a CUDA device of compute capability 8.0 or newer (A100, RTX 30 or later) and "
    "a PyTorch built with CUDA"
)


@dataclass(frozen=True)
class DeviceFacts:
    """A device with its software. Times of one say nothing of another.

    Attributes:
        device: name of the device.
        capability: its compute capability, ``9.0``.
        torch: version of PyTorch, which brings the kernels, with its CUDA: ``2.11.0+cu130``.
    """

    device: str
    capability: str
    torch: str

    def __str__(self) -> str:
        return f"{self.device} ({self.capability}) with torch {self.torch}"

    def as_json(self) -> dict[str, str]:
        """The facts as a table of speeds holds them."""
        return asdict(self)


def lacking(device: torch.device | None = None) -> str:
    """What a device lacks to run 2:4 kernels, or without one this machine; empty if it lacks
    nothing.
    """
    if not torch.cuda.is_available():
        return f"{NEEDS}; torch {torch.__version__} sees no CUDA device here"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST:
        found = ".".join(map(str, capability))
        return f"{NEEDS}; {torch.cuda.get_device_name(device)} has {found}"
    return ""


def facts_of(device: torch.device) -> DeviceFacts:
    """The facts of a CUDA device."""
    capability = torch.cuda.get_device_capability(device)
    return DeviceFacts(
        torch.cuda.get_device_name(device), ".".join(map(str, capability)), str(torch.__version__)
    )
