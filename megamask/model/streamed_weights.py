"""The Megatron weights of a model, written tensor by tensor from the files of the model.

The checkpoint is what ``save_sharded`` would write of the filled model: the same keys, shapes,
dtypes, places of the shards and numbers. No model is built, and a rank has some megabytes of its
shard in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from megamask.model.build import model_rules
from megamask.model.checkpoint import write_folder
from megamask.parallel.mesh import Mesh
from megamask.weights.architecture import Architecture
from megamask.weights.dist_checkpoint.checkpoint_writer import CheckpointWriter, write_index
from megamask.weights.mapping import Rule
from megamask.weights.rule_stream import finite_check, streamed_shard
from megamask.weights.source import WeightSource


def save_streamed(
    reader: WeightSource,
    arch: Architecture,
    path: Path,
    mesh: Mesh,
    note: dict[str, Any],
    files: Sequence[Path] = (),
) -> int:
    """Write the weights in the dtype of ``arch``, a JSON note and copies of ``files`` as the folder
    ``path``, and return the number of weights. All ranks must call this function.

    Raises:
        ArtifactError: numbers that are not finite, in the files or in the dtype of the model; the
            disk is full, or ``path`` cannot be written.
    """
    table = model_rules(arch, mesh.tp)

    def write(folder: Path) -> None:
        written, failure = [], None
        if mesh.dp_rank == 0:
            try:
                with CheckpointWriter(folder, mesh.tp_rank) as writer:
                    for rule in table:
                        if rule.kind != "replicate" or mesh.tp_rank == 0:
                            _add(writer, rule, reader, arch.dtype, mesh)
                written = writer.written
            except Exception as error:
                failure = error
        mesh.leave_together(failure, "write its part")
        pieces = mesh.gather_to_main(written)
        if mesh.is_main:
            write_index(folder, list(chain(*pieces)), {})

    write_folder(path, mesh, note, files, write)
    return sum(torch.Size(rule.shape()).numel() for rule in table)


def _add(
    writer: CheckpointWriter, rule: Rule, reader: WeightSource, dtype: torch.dtype, mesh: Mesh
) -> None:
    """Write the shard of this rank of a Megatron tensor.

    Raises:
        ArtifactError: the HF tensors hold numbers that are not finite in ``dtype``.
    """
    check = finite_check(reader, rule, dtype)
    for rows, offsets in rule.chunks(mesh.tp_rank, mesh.tp):
        numbers = streamed_shard(reader, rule, dtype, mesh.tp_rank, mesh.tp, rows)
        writer.add(rule.megatron, offsets, rule.shape(), numbers, check)
