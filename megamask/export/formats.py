"""The formats of an export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megamask.export import mask_archive, masked_folder, megatron_folder
from megamask.masks.file import MaskSet
from megamask.weights.base_model import BaseModel
from megamask.weights.source import WeightSource


@dataclass(frozen=True)
class Format:
    """A format of an export.

    Attributes:
        write: writes base model, folder, dense tensors and masks (None = dense).
        holds_weights: whether weights are written, and not the masks alone.
    """

    write: Callable[[BaseModel, Path, WeightSource, MaskSet | None], None]
    holds_weights: bool = True


# export.format -> the format
FORMATS: dict[str, Format] = {
    "hf": Format(masked_folder.export),
    "megatron": Format(megatron_folder.export),
    "maskllm": Format(mask_archive.export_maskllm, holds_weights=False),
    "patch": Format(mask_archive.export_patch, holds_weights=False),
}
