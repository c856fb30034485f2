"""A masked checkpoint that Megatron-LM loads with ``--load``, at any tensor and pipeline parallel
size and with either spec of its layers.

The folder is a release (``latest_checkpointed_iteration.txt`` says so, and the tensors lie in
``release``), which Megatron-LM starts from without an optimizer. The format is ``torch_dist``:
PyTorch's distributed checkpoint, with ``metadata.json`` and ``common.pt`` of Megatron-Core. Layers
are stacked, and norms have the names of the linears behind them, which is what Megatron-Core asks
for unless it is told otherwise. ``common.pt`` holds the version of the checkpoint, without which
Megatron-LM would take queries, keys and values for those of an old order
(``fix_query_key_value_ordering`` in megatron/training/checkpointing.py), and the arguments of the
model. The extra states of modules are there and empty, because a load asks for them.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from megamask.errors import ArtifactError
from megamask.export.folded import check_zeros, fold, tell_written, write_stamp
from megamask.masks.file import MaskSet
from megamask.storage import atomic_dir
from megamask.weights.base_model import BaseModel
from megamask.weights.dist_checkpoint.checkpoint_folder import RELEASE, TRACKER, find_checkpoint
from megamask.weights.dist_checkpoint.checkpoint_writer import CheckpointWriter, write_index
from megamask.weights.dist_checkpoint.megatron_args import (
    beyond_gpt_model,
    flags_beside,
    megatron_args,
)
from megamask.weights.dist_checkpoint.megatron_names import fused_name, stacked_name
from megamask.weights.dist_checkpoint.megatron_reader import MegatronReader
from megamask.weights.family import Architecture
from megamask.weights.hf_files import copy_side_files
from megamask.weights.mapping import block, rules
from megamask.weights.source import FINITE, WeightSource, not_finite

log = logging.getLogger(__name__)
MULTIPLE = 128  # Megatron-LM's --make-vocab-size-divisible-by
VERSION = 3.0  # of Megatron-LM's checkpoints since queries, keys and values have their order
# Modules of a layer that have an extra state in Megatron-Core or in Transformer Engine.
STATES = (
    "self_attention.linear_qkv",
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


def export(base: BaseModel, out: Path, source: WeightSource, masks: MaskSet | None) -> None:
    """Write a masked checkpoint, check it and print its size.

    Args:
        base: the model; the files beside its weights (config.json, tokenizer, licence) are copied
            into the folder.
        out: the folder to write, for Megatron-LM's ``--load``.
        source: the dense tensors.
        masks: the masks; None writes the dense tensors.

    Raises:
        ArtifactError: the written folder fails its check, or a number is too large for the dtype of
            config.json; ``out`` does not change.
    """
    arch = base.architecture()
    with atomic_dir(out) as folder:
        release = folder / RELEASE
        release.mkdir()
        rows = -(-arch.vocab // MULTIPLE) * MULTIPLE
        with CheckpointWriter(release) as writer:
            for key, offsets, size, tensor in _pieces(arch, rows, source, masks):
                writer.add(key, offsets, size, tensor)
            for key in _states(arch):
                writer.add_state(key)
        args = argparse.Namespace(**megatron_args(arch, rows))
        common = {
            "checkpoint_version": VERSION,
            "iteration": 0,
            "args": args,
            "content_metadata": {"singleton_local_shards": False},
        }
        write_index(release, writer.written, common)
        copy_side_files(base.hf_dir, folder, base.config)
        (folder / TRACKER).write_text(RELEASE)
        fix = "Export again; report it if it stays."
        with MegatronReader(find_checkpoint(folder), arch, fix) as written:
            check_zeros(written, masks)
        write_stamp(folder, masks)
    if lacking := beyond_gpt_model(arch):
        what = "%s: Megatron-LM has no arguments for %s of this model, and computes another one"
        log.warning(what, out, ", ".join(lacking))
    flags = " ".join(flags_beside(arch))
    tell_written(out, masks, f" as a Megatron checkpoint, to load with {flags}")


Piece = tuple[str, tuple[int, ...], tuple[int, ...], Tensor]  # key, offsets, whole size, tensor


def _pieces(
    arch: Architecture, rows: int, source: WeightSource, masks: MaskSet | None
) -> Iterator[Piece]:
    """The tensors of the checkpoint in the order of the model, a layer of a stacked tensor at a
    time. A single tensor of the source is in memory beside the piece.
    """
    last: dict[str, Tensor] = {}

    def read(name: str, lines: slice, columns: slice | None) -> Tensor:
        if name not in last:
            last.clear()
            last[name] = _stored(name, fold(name, source.tensor(name), masks), arch, source)
        return block(last[name], lines, columns)

    for rule in rules(arch, rows):
        whole = rule.shard(read, 0, 1).contiguous()
        key, layer = stacked_name(fused_name(rule.megatron))
        if layer is None:
            yield key, (0,) * whole.dim(), tuple(whole.shape), whole
        else:
            offsets, size = (layer, *(0,) * whole.dim()), (arch.num_layers, *whole.shape)
            yield key, offsets, size, whole[None]


def _stored(name: str, tensor: Tensor, arch: Architecture, source: WeightSource) -> Tensor:
    """A tensor in the dtype of config.json, as the verb convert writes it.

    Raises:
        ArtifactError: the dtype does not hold its numbers.
    """
    stored = tensor.to(arch.dtype)
    if stored.dtype != tensor.dtype and (problem := not_finite(name, tensor, stored)):
        raise ArtifactError(source.folder, problem, FINITE)
    return stored


def _states(arch: Architecture) -> Iterator[str]:
    """The names of the extra states, which are objects: NAME/shard_LAYER_LAYERS."""
    norms = ("self_attention.q_layernorm", "self_attention.k_layernorm")
    for module in STATES + (norms if arch.qk_norm else ()):
        for layer in range(arch.num_layers):
            yield f"decoder.layers.{module}._extra_state/shard_{layer}_{arch.num_layers}"
    yield "decoder.final_layernorm._extra_state/shard_0_1"
