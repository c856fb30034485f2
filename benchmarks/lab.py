"""A learner on a model of a given shape that needs no files.

The weights are random and are made on the device; random tokens go through the real data path.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megamask.config import Config, load_config
from megamask.config.method_names import DISTRIBUTION_OF
from megamask.data.batches import BatchPlan
from megamask.learn.gumbel import GradientLearner
from megamask.learn.masked_model import MaskedModel
from megamask.model.build import attach_logits, build_model, prunable_linears
from megamask.model.checkpoint import fill_from_hf
from megamask.model.language_model import LanguageModel
from megamask.model.mask_shards import patterns_by_linear
from megamask.parallel.mesh import Mesh, start
from megamask.sparsity.distributions import DISTRIBUTIONS
from megamask.user_paths import path_argument
from megamask.weights.architecture import Architecture
from megamask.weights.hf_files import open_checked
from megamask.weights.layer_plan import layer_plan
from megamask.weights.shapes import SHAPES, read_shape

LOGIT_STD = 0.01  # standard deviation of the initial logits, from the paper of MaskLLM


@dataclass
class Lab:
    """A learner and the batches that it reads."""

    config: Config
    mesh: Mesh
    masked_model: MaskedModel
    learner: GradientLearner | None
    plan: BatchPlan

    @property
    def tokens_per_step(self) -> int:
        """Number of tokens of a global batch."""
        return self.plan.global_batch * self.config.data.seq_length


def add_model_options(options: argparse.ArgumentParser) -> None:
    """The options that choose model and batch."""
    options.add_argument(
        "--model",
        default="smollm2-135m",
        help=f"random weights of this shape: {', '.join(SHAPES)} or a config.json",
    )
    options.add_argument("--hf", type=path_argument, metavar="FOLDER", help="a real model instead")
    options.add_argument("--layers", type=int, help="only so many layers of the shape")
    options.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    options.add_argument("--micro", type=int, default=4, help="sequences of a micro-batch")
    options.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    options.add_argument("--seq", type=int, default=256, help="tokens of a sequence")
    options.add_argument(
        "settings", nargs="*", metavar="key=value", help="megamask settings, as for its verbs"
    )


def read_config(options: argparse.Namespace) -> Config:
    """The settings of the learner, from the options."""
    chosen = {
        "device": options.device,
        "dtype": options.dtype,
        "data.seq_length": options.seq,
        "learn.method": "categorical",
        "learn.micro_batch": options.micro,
        "learn.global_batch": options.micro * options.accumulate,
    }
    if options.threads:
        chosen["parallel.threads"] = options.threads
    return load_config(
        None, [*(f"{key}={value}" for key, value in chosen.items()), *options.settings]
    )


@contextmanager
def open_lab(options: argparse.Namespace, steps: int, with_learner: bool = True) -> Iterator[Lab]:
    """Build model, data and learner on a single process.

    Args:
        options: the options of ``parser`` and ``add_model_options``.
        steps: number of steps that the data is enough for.
        with_learner: False builds the dense model without mask logits, gradient buffers and
            optimizer.
    """
    config = read_config(options)
    with start(config) as mesh, tempfile.TemporaryDirectory() as folder:
        masked_model = random_masked_model(config, mesh, options, with_learner)
        dataset = random_tokens(
            Path(folder),
            masked_model.arch.vocab,
            steps * config.learn.global_batch,
            options.seq,
            config.seed,
        )
        plan = BatchPlan(
            dataset, config.learn.global_batch, config.learn.micro_batch, mesh.dp, mesh.dp_rank
        )
        yield Lab(
            config,
            mesh,
            masked_model,
            GradientLearner(config, mesh, masked_model) if with_learner else None,
            plan,
        )


def random_masked_model(
    config: Config, mesh: Mesh, options: argparse.Namespace, with_logits: bool = True
) -> MaskedModel:
    """The model; with ``with_logits``, with mask logits from N(0, 0.01)."""
    arch = architecture(options)
    model = build_model(config, arch, mesh)
    if options.hf:
        with open_checked(options.hf) as reader:
            fill_from_hf(model, arch, mesh, reader)
    else:
        fill_random(model, config.seed)
    linears = prunable_linears(model, config, arch)
    switch: Any = None
    if with_logits:
        switch = attach_logits(
            linears,
            patterns_by_linear(layer_plan(arch, config), arch),
            config.learn.sampling.backend,
            mesh.device,
            DISTRIBUTIONS[DISTRIBUTION_OF[config.learn.method]],
            config.learn.state.logits,
        )
    masked_model = MaskedModel(arch, "", model, linears, switch, None)
    for logits in masked_model.mask_logits:
        torch.nn.init.normal_(logits, std=LOGIT_STD)
    return masked_model


def architecture(options: argparse.Namespace) -> Architecture:
    """The architecture of ``--hf``, or of ``--model`` with only ``--layers`` layers."""
    arch = read_shape(str(options.hf or options.model), "--hf" if options.hf else "--model")
    if options.layers is None or options.hf:
        return arch
    return replace(arch, num_layers=options.layers)


@torch.no_grad()
def fill_random(model: LanguageModel, seed: int) -> None:
    """Fill matrices with N(0, 1 / in_features) on their device, and norms with 1."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
        else:
            parameter.fill_(1)
    model.clear_padding()


@dataclass(frozen=True)
class _NoTokenizer:
    """The attributes that GPTDataset reads from a tokenizer."""

    vocab_size: int
    pad: int = -1
    eod: int = -2

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """The tokenizer's part of GPTDataset's cache key."""
        return {"name": "random"}


def random_tokens(folder: Path, vocab: int, samples: int, seq_length: int, seed: int) -> Any:
    """Megatron's GPTDataset over uniform random tokens in ``folder``.

    The tokens are read from disk through a memory map, as in a learning run.
    """
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from megatron.core.datasets.utils import Split

    prefix = str(folder / "random")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    tokens = np.random.default_rng(seed).integers(
        vocab, size=(samples + 1) * seq_length, dtype=np.int32
    )
    for document in np.array_split(tokens, 8):
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    settings = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=[([prefix], None), None, None],
        tokenizer=_NoTokenizer(vocab),
        path_to_cache=str(folder / "cache"),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indexed = GPTDataset.build_low_level_dataset(prefix, settings)
    return GPTDataset(indexed, prefix, np.arange(8, dtype=np.int32), samples, Split.train, settings)
