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
from dataclasses import replace
from pathlib import Path

from megamask.export.folded import (
    FoldedSource,
    check_zeros,
    say_nothing_of_sparsity,
    tell_written,
    write_stamp,
)
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
from megamask.weights.fingerprint import fingerprints_of
from megamask.weights.mapping import Rule, rules
from megamask.weights.rule_stream import finite_check, streamed_shard
from megamask.weights.side_files import copy_side_files
from megamask.weights.source import WeightSource

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
            folded = FoldedSource(source, masks)
            for rule in rules(arch, rows):
                _add(writer, rule, folded, arch)
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
        base.complete(folder, out.name)
        say_nothing_of_sparsity(folder)
        (folder / TRACKER).write_text(RELEASE)
        fix = "Export again; report it if it stays."
        with MegatronReader(find_checkpoint(folder), arch, fix) as written:
            check_zeros(written, masks)
            fingerprint = fingerprints_of(written, arch).exact
        write_stamp(folder, masks, fingerprint)
    if lacking := beyond_gpt_model(arch):
        what = "%s: Megatron-LM has no arguments for %s of this model, and computes another one"
        log.warning(what, out, ", ".join(lacking))
    flags = " ".join(flags_beside(arch))
    tell_written(out, masks, f" as a Megatron checkpoint, to load with {flags}")


def _add(writer: CheckpointWriter, rule: Rule, folded: FoldedSource, arch: Architecture) -> None:
    """Write a tensor in the dtype of config.json, as the verb convert does, or its layer of a
    stacked tensor.

    Raises:
        ArtifactError: the dtype does not hold its numbers.
    """
    numbers, check = streamed_shard(folded, rule, arch.dtype), None
    if any(folded.read(name, slice(0, 0)).dtype != arch.dtype for name in rule.hf):
        check = finite_check(folded, rule, arch.dtype)
    key, layer = stacked_name(fused_name(rule.megatron))
    offsets, size = (0,) * len(numbers.shape), numbers.shape
    if layer is not None:
        offsets, size = (layer, *offsets), (arch.num_layers, *size)
        numbers = replace(numbers, shape=(1, *numbers.shape))
    writer.add(key, offsets, size, numbers, check)


def _states(arch: Architecture) -> Iterator[str]:
    """The names of the extra states, which are objects: NAME/shard_LAYER_LAYERS."""
    norms = ("self_attention.q_layernorm", "self_attention.k_layernorm")
    for module in STATES + (norms if arch.qk_norm else ()):
        for layer in range(arch.num_layers):
            yield f"decoder.layers.{module}._extra_state/shard_{layer}_{arch.num_layers}"
    yield "decoder.final_layernorm._extra_state/shard_0_1"
