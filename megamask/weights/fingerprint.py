"""Which base model a mask belongs to: a hash that is cheap, and the same whether the weights are on
disk or loaded.

sha256 over the prunable linears in name order: name, shape, and the bf16 bytes of a 16 x 16 grid of
evenly spaced elements. The bf16 cast makes bf16 and fp32 copies of a model agree (fp16 copies need
not: they round differently).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megamask.weights.architecture import read_architecture
from megamask.weights.hf_files import open_checked
from megamask.weights.mapping import linear_shapes

GRID = 16


def fingerprint(shapes: Mapping[str, tuple[int, ...]], row: Callable[[str, int], Tensor]) -> str:
    """Hex digest of a model.

    Args:
        shapes: HF module name -> (O, I) of every prunable linear.
        row: gives one row (I,) of a linear's weight.
    """
    digest = hashlib.sha256(b"megamask-fingerprint-v1")
    for name in sorted(shapes):
        digest.update(f"{name}:{tuple(shapes[name])}".encode())
        rows, columns = (_spread(size) for size in shapes[name])
        grid = torch.stack([row(name, one).detach()[columns].cpu() for one in rows])
        digest.update(grid.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def fingerprint_hf(hf_dir: Path) -> str:
    """Fingerprint of a Hugging Face folder, reading 16 rows of each linear.

    Raises:
        ArtifactError, ConfigError: the folder is incomplete or of a kind that is not built.
    """
    shapes = linear_shapes(read_architecture(hf_dir))
    with open_checked(hf_dir) as reader:
        return fingerprint(
            shapes, lambda name, one: reader.read(f"{name}.weight", slice(one, one + 1))[0]
        )


def fingerprint_model(model: nn.Module) -> str:
    """Fingerprint of a transformers model in memory: of all its linears but the head."""
    linears = model_linears(model)
    return fingerprint(
        {name: tuple(one.weight.shape) for name, one in linears.items()},
        lambda name, one: linears[name].weight[one],
    )


def model_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """HF module name -> linear, for the prunable linears of a transformers model."""
    find_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    return {
        name: one
        for name, one in model.named_modules()
        if isinstance(one, nn.Linear) and one is not head
    }


def _spread(size: int) -> list[int]:
    return [index * size // GRID for index in range(GRID)]
