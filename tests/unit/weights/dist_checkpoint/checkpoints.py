"""A small Megatron checkpoint as PyTorch writes it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megamask.errors import MegamaskError
from megamask.safe_checkpoint import COMMON
from megamask.weights.base_model import BaseModel
from megamask.weights.dist_checkpoint.checkpoint_folder import FORMAT

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 10,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LAYER = "decoder.layers.1.mlp.linear_fc2.weight"


def write(
    folder: Path, tensors: dict[str, Any], args: object = None, new_form: bool = False
) -> Path:
    """A checkpoint as PyTorch writes it, with Megatron's files beside. In the new form, that of
    Megatron-Core 0.19, what is no tensor is an object among the tensors.
    """
    shutil.rmtree(folder, ignore_errors=True)
    common = {"args": args, "checkpoint_version": 3.0}
    if new_form:
        tensors = {**tensors, "common_state/shard_0_1": [common]}
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    writer = dcp.FileSystemWriter(folder)
    dcp.save(dict(tensors), storage_writer=writer, planner=planner, no_dist=True)
    (folder / FORMAT).write_text('{"sharded_backend": "torch_dist"}')
    if not new_form:
        torch.save(common, folder / COMMON)
    return folder


def refusal(hf: Path, folder: Path) -> str:
    """The message about a checkpoint."""
    with pytest.raises(MegamaskError) as caught, BaseModel(hf, folder).open():
        pass
    return str(caught.value)
