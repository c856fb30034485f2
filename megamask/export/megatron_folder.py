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
import io
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from megamask.errors import ArtifactError
from megamask.export.folded import check_zeros, fold, tell_written, write_stamp
from megamask.masks.file import MaskSet
from megamask.safe_checkpoint import COMMON, INDEX
from megamask.storage import atomic_dir, write_json
from megamask.weights.base_model import BaseModel
from megamask.weights.dist_checkpoint.checkpoint_folder import (
    BACKEND,
    FORMAT,
    RELEASE,
    TRACKER,
    find_checkpoint,
)
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
FILE_BYTES = 5 * 10**9
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
        writer = CheckpointWriter(release)
        for key, offsets, size, tensor in _pieces(arch, rows, source, masks):
            writer.add(key, offsets, size, tensor)
        for key in _states(arch):
            writer.add_state(key)
        writer.finish()
        args = argparse.Namespace(**megatron_args(arch, rows))
        common = {
            "checkpoint_version": VERSION,
            "iteration": 0,
            "args": args,
            "content_metadata": {"singleton_local_shards": False},
        }
        torch.save(common, release / COMMON)
        backends = {"sharded_backend": BACKEND, "common_backend": "torch"}
        versions = {"sharded_backend_version": 1, "common_backend_version": 1}
        write_json(release / FORMAT, backends | versions)
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


class CheckpointWriter:
    """Writes the files and the index of a checkpoint, a piece at a time.

    Args:
        folder: an empty folder.
        file_bytes: after so many bytes the next file begins.
    """

    def __init__(self, folder: Path, file_bytes: int = FILE_BYTES) -> None:
        from torch.distributed.checkpoint.metadata import Metadata

        self._folder, self._file_bytes = folder, file_bytes
        self._index = Metadata({}, storage_data={})
        self._file: BinaryIO | None = None
        self._count = 0
        state = io.BytesIO()
        torch.save([None], state)
        self._state = state.getvalue()

    def add(self, key: str, offsets: tuple[int, ...], size: tuple[int, ...], piece: Tensor) -> None:
        """Write a piece of a tensor.

        Args:
            key: name of the tensor.
            offsets: place of the first number of the piece.
            size: shape of the whole tensor.
            piece: its numbers.
        """
        from torch.distributed.checkpoint.metadata import (
            ChunkStorageMetadata,
            TensorProperties,
            TensorStorageMetadata,
        )

        new = TensorStorageMetadata(TensorProperties(piece.dtype), torch.Size(size), [])
        entry = self._index.state_dict_metadata.setdefault(key, new)
        assert isinstance(entry, TensorStorageMetadata)
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), piece.shape))
        file = self._open()
        start = file.tell()
        alone = piece.is_contiguous() and piece.untyped_storage().nbytes() == piece.nbytes
        # PyTorch would save the whole storage of a view.
        torch.save(piece if alone else piece.clone(memory_format=torch.contiguous_format), file)
        self._note(key, torch.Size(offsets), start)

    def add_state(self, key: str) -> None:
        """Write an empty extra state."""
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata

        self._index.state_dict_metadata[key] = BytesStorageMetadata()
        file = self._open()
        start = file.tell()
        file.write(self._state)
        self._note(key, None, start)

    def finish(self) -> None:
        """Write the index."""
        self._open().close()
        with (self._folder / INDEX).open("wb") as file:
            pickle.dump(self._index, file)

    def _open(self) -> BinaryIO:
        """The file that takes the next piece."""
        if self._file is not None and self._file.tell() >= self._file_bytes:
            self._file.close()
            self._file, self._count = None, self._count + 1
        if self._file is None:
            self._file = (self._folder / self._name()).open("wb")
        return self._file

    def _name(self) -> str:
        return f"__0_{self._count}.distcp"

    def _note(self, key: str, offsets: torch.Size | None, start: int) -> None:
        """Note where the piece lies that was written last."""
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import MetadataIndex

        assert self._file is not None
        length = self._file.tell() - start
        self._index.storage_data[MetadataIndex(key, offsets)] = _StorageInfo(
            self._name(), start, length
        )
