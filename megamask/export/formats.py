"""The formats of an export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megamask.export import masked_folder, megatron_folder
from megamask.masks.file import MaskSet
from megamask.weights.base_model import BaseModel
from megamask.weights.source import WeightSource

Write = Callable[[BaseModel, Path, WeightSource, "MaskSet | None"], None]

# export.format -> the function that writes it
FORMATS: dict[str, Write] = {
    "hf": masked_folder.export,
    "megatron": megatron_folder.export,
}
