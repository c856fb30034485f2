"""Megatron weights of which some linears have new values, beside a mask that belongs to them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megamask.config import Config, run_paths
from megamask.model.build import build_model, masked_linears, padded_vocab
from megamask.model.checkpoint import load_weights, save_sharded, sharded_state
from megamask.parallel.mesh import Mesh
from megamask.weights.architecture import Architecture


def save_updated(
    config: Config,
    arch: Architecture,
    mesh: Mesh,
    weights_OI: Mapping[str, torch.Tensor],
    path: Path,
    note: Mapping[str, Any],
    masks_OI: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Save the dense weights of a run with new weights of some linears in their places.

    The dtype is that of the dense weights on disk. A second model in this dtype holds the weights
    until they are written, so that a weight that is not pruned keeps every bit.

    Args:
        config: names the run.
        arch: the architecture.
        mesh: process groups of this rank; all ranks must call this function.
        weights_OI: this rank's shards of the new weights, by Megatron name.
        path: the folder.
        note: the note beside the weights, with the dtype of the dense weights.
        masks_OI: this rank's shards of the masks, likewise; a row without a removed weight keeps
            its dense weights. None replaces every row.
    """
    dense = run_paths(config).weights
    model = build_model(config, arch, mesh, dtype=getattr(torch, note["dtype"]))
    load_weights(model, dense)
    linears = masked_linears(model)
    for name, new_OI in weights_OI.items():
        weight_OI = linears[name].weight.data
        if masks_OI is None:
            weight_OI.copy_(new_OI)
            continue
        rows = _with_removed(masks_OI[name], mesh, linears[name].shard_axis)
        weight_OI[rows] = new_OI.to(weight_OI)[rows]
    note = {**note, "padded_vocab": padded_vocab(arch, mesh.tp)}
    save_sharded(sharded_state(model), path, mesh, dict(note), files=[dense / "config.json"])


def _with_removed(mask_OI: torch.Tensor, mesh: Mesh, shard_axis: int) -> torch.Tensor:
    """The rows with a removed weight, on whatever rank it lies, (O,) bool."""
    removed_O = (~mask_OI).any(dim=1).to(mesh.device, torch.float32)
    if shard_axis == 1:
        mesh.sum_over_tp(removed_O)
    return removed_O > 0
