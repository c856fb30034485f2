"""What a user of Megatron-Core does with a checkpoint. Nothing here is of this package: models are
plain GPTModels with the local spec, saved and loaded by ``megatron.core.dist_checkpointing``.
"""

from __future__ import annotations

import argparse
import os
import queue
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True)
class Shape:
    """A model: 2 layers, 8 heads of 8 dimensions, 4 KV heads, SwiGLU, RMSNorm, rotary embedding.

    Attributes:
        vocab: rows of the embedding of a model at TP 1.
        qkv_bias: whether queries, keys and values have biases.
        tied: whether the head shares the embedding.
    """

    vocab: int
    qkv_bias: bool = False
    tied: bool = False


@dataclass(frozen=True)
class Layout:
    """How a checkpoint is laid out.

    Attributes:
        metadata: what Megatron-Core is told about it.
        prefix: beginning of all names.
        training: whether an optimizer and generators are beside the model.
    """

    metadata: dict[str, bool]
    prefix: str = ""
    training: bool = False


@contextmanager
def megatron(tp: int) -> Iterator[None]:
    """Process groups of gloo, and CUDA's streams and generators out of the way."""
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tp)
    tracker = tensor_parallel.random.CudaRNGStatesTracker
    try:
        with (
            patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")),
            patch.object(torch.cuda, "synchronize", lambda device=None: None),
            patch.object(tracker, "fork", lambda *_: nullcontext()),
            # Megatron's saves collect results in a process that imports torch anew.
            patch.object(filesystem_async, "_get_write_results_queue", queue.Queue, create=True),
        ):
            yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def gpt_model(shape: Shape, tp: int) -> GPTModel:
    """The model with random weights."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=8,
        num_query_groups=4,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        tensor_model_parallel_size=tp,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=shape.vocab,
        max_sequence_length=128,
        position_embedding_type="rope",
        rotary_base=10000,
        parallel_output=False,
        share_embeddings_and_output_weights=shape.tied,
    ).eval()
    generator = torch.Generator().manual_seed(parallel_state.get_tensor_model_parallel_rank())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # equal on all ranks
                parameter.copy_(1 + 0.2 * torch.linspace(-1, 1, parameter.numel()))
            else:
                parameter.normal_(0, 0.2, generator=generator)
    return model


@torch.no_grad()
def logits_of(model: GPTModel, tokens_NS: torch.Tensor) -> torch.Tensor:
    """Logits (N, S, rows of the head) of all ranks."""
    length = tokens_NS.shape[1]
    hidden = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    logits: torch.Tensor = model(tokens_NS, torch.arange(length).expand_as(tokens_NS), hidden)
    return logits


def args_of(model: GPTModel) -> argparse.Namespace:
    """The arguments that Megatron-LM would keep of the model."""
    config = model.config
    return argparse.Namespace(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        group_query_attention=True,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        max_position_embeddings=model.max_sequence_length,
        padded_vocab_size=model.vocab_size,
        position_embedding_type=model.position_embedding_type,
        rotary_base=10000,
        rotary_percent=1.0,
        normalization=config.normalization,
        norm_epsilon=config.layernorm_epsilon,
        add_bias_linear=config.add_bias_linear,
        add_qkv_bias=config.add_qkv_bias,
        qk_layernorm=config.qk_layernorm,
        swiglu=True,
        untie_embeddings_and_output_weights=not model.share_embeddings_and_output_weights,
        params_dtype=config.params_dtype,
        bf16=False,
        fp16=False,
    )


def save(model: GPTModel, folder: Path, layout: Layout) -> None:
    """Save as Megatron-LM does, in the iteration 7 of ``folder``."""
    iteration = folder / "iter_0000007"
    if torch.distributed.get_rank() == 0:
        iteration.mkdir(parents=True)
        (folder / "latest_checkpointed_iteration.txt").write_text("7")
    torch.distributed.barrier()
    weights = model.sharded_state_dict(layout.prefix, metadata=dict(layout.metadata))
    state: dict[str, Any] = {"model": weights, "checkpoint_version": 3.0, "iteration": 7}
    state["args"] = args_of(model)
    if layout.training:
        moment = torch.ones(4)
        state["optimizer"] = ShardedTensor.from_rank_offsets(
            "optimizer.state.exp_avg.embedding.word_embeddings.weight",
            moment,
            replica_id=torch.distributed.get_rank(),
        )
        state["rng"] = ShardedObject(
            "rng_state", {"any": "object"}, (1,), (0,), replica_id=torch.distributed.get_rank()
        )
    dist_checkpointing.save(state, str(iteration), content_metadata=dict(layout.metadata))


def save_all(
    rank: int, root: Path, shapes: list[Shape], layouts: list[Layout], tokens_NS: torch.Tensor
) -> list[torch.Tensor]:
    """Save every model in every layout, as ``root/SHAPE-LAYOUT``, and return the logits."""
    found = []
    with megatron(int(os.environ["WORLD_SIZE"])):
        for number, shape in enumerate(shapes):
            model = gpt_model(shape, int(os.environ["WORLD_SIZE"]))
            for index, layout in enumerate(layouts):
                save(model, root / f"{number}-{index}", layout)
            found.append(logits_of(model, tokens_NS))
    return found


def load_all(
    rank: int, folders: list[Path], shapes: list[Shape], tokens_NS: torch.Tensor
) -> list[torch.Tensor]:
    """Load the checkpoint of each ``--load`` folder into a model of its shape, as Megatron-LM does,
    and return the logits.
    """
    found = []
    with megatron(int(os.environ["WORLD_SIZE"])):
        for folder, shape in zip(folders, shapes, strict=True):
            model = gpt_model(shape, int(os.environ["WORLD_SIZE"]))
            release = str(folder / (folder / "latest_checkpointed_iteration.txt").read_text())
            common = dist_checkpointing.load_common_state_dict(release)
            metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
            state = {"model": model.sharded_state_dict(metadata=metadata)}
            loaded = dist_checkpointing.load(state, release)
            assert loaded["checkpoint_version"] == 3.0
            assert common["args"].num_layers == model.config.num_layers
            model.load_state_dict(loaded["model"], strict=True)
            found.append(logits_of(model, tokens_NS))
    return found
