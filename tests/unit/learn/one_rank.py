"""A tiny Llama with random weights under mask logits, on one rank and without files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megamask.config import Config
from megamask.config.load import build_config
from megamask.data.batches import BatchPlan
from megamask.learn.masked_model import MaskedModel
from megamask.learn.methods import find_method
from megamask.model.build import attach_logits, build_model, prunable_linears
from megamask.parallel.mesh import Mesh, start
from megamask.sparsity.pattern import Pattern
from megamask.weights.architecture import read_architecture

ROOT = Path(__file__).resolve().parents[3]
VOCAB, LENGTH = 512, 16


def tiny_config(learn: Mapping[str, Any] | None = None, threads: int = 1) -> Config:
    """The settings of a run with the defaults of ``learn`` but for the numba backend and the given
    ones.
    """
    section = {"steps": 4, "micro_batch": 2, "global_batch": 4, "prior": {"mask": None}}
    return build_config(
        {
            "device": "cpu",
            "parallel": {"threads": threads},
            "data": {"seq_length": LENGTH},
            "learn": {**section, "sampling": {"backend": "numba"}, **(learn or {})},
        }
    )


@contextmanager
def tiny_masked_model(config: Config, layers: int = 2) -> Iterator[tuple[Mesh, MaskedModel]]:
    """The mesh of one process, and a model with random weights and mask logits."""
    threads = torch.get_num_threads()
    file = ROOT / "configs" / "models" / "tiny-llama.json"
    arch = replace(read_architecture(file), num_layers=layers)
    pattern, learn = Pattern.parse(config.pattern), config.learn
    try:
        with start(config) as mesh:
            model = build_model(config, arch, mesh)
            noise = torch.Generator().manual_seed(0)
            for parameter in model.parameters():
                parameter.data.normal_(std=0.1, generator=noise)
            linears = prunable_linears(model, config, arch)
            switch = attach_logits(
                linears,
                dict.fromkeys(linears, pattern),
                learn.sampling.backend,
                mesh.device,
                find_method(learn.method).distribution,
                learn.state.logits,
            )
            masked_model = MaskedModel(arch, "", model, linears, switch, None)
            for logits in masked_model.mask_logits:
                logits.data.normal_(std=0.01, generator=noise)
            yield mesh, masked_model
    finally:
        torch.set_num_threads(threads)


class RandomTokens:
    """Samples by number, every one from its own random generator."""

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(number)
        row = torch.randint(VOCAB, (LENGTH + 1,), generator=generator)
        return {"tokens": row[:-1], "labels": row[1:]}


def tiny_plan(config: Config, mesh: Mesh) -> BatchPlan:
    """Batches of random tokens."""
    learn = config.learn
    return BatchPlan(RandomTokens(), learn.global_batch, learn.micro_batch, mesh.dp, mesh.dp_rank)
