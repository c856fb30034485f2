"""A tiny Llama and what learning on it needs, for jobs of several ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megamask.config import Config
from megamask.config.load import build_config
from megamask.config.paths import margins_path
from megamask.learn.masked_model import MaskedModel
from megamask.masks.file import load_masks, save_masks
from megamask.masks.margins import save_margins
from megamask.model.mask_shards import linear_rules
from megamask.parallel.masked_linear import MaskedLinear
from megamask.parallel.mesh import Mesh
from megamask.sparsity.margins import to_codes, to_levels
from megamask.sparsity.pattern import Pattern
from megamask.verbs import convert
from megamask.weights.architecture import Architecture, read_architecture
from megamask.weights.base_model import BaseModel
from megamask.weights.mapping import linear_shapes
from tests.fork_server import ROOT
from tests.parallel.ranks import run_ranks

GQA: dict[str, Any] = {
    "num_attention_heads": 16,
    "head_dim": 4,
}  # with the file's 8 KV heads: two queries a KV head, and TP up to 8
# TP 4 divides nothing that TP 8 does not divide: it is for the night.
TPS = (1, 2, 4, 8) if os.environ.get("NIGHTLY") == "1" else (1, 2, 8)


def make_hf(
    folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Path:
    """A random Llama in the shape of configs/models/tiny-llama.json, saved by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = json.loads((ROOT / "configs" / "models" / "tiny-llama.json").read_text()) | overrides
    shape.pop("torch_dtype")
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**shape))
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases would be ones and zeros
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return folder


def convert_rank(rank: int, config: Config) -> None:
    """The verb convert."""
    convert.run(config)


def make_run(folder: Path) -> Path:
    """A run directory with Megatron weights of a tiny fp32 Llama and its magnitude masks with their
    margins.
    """
    hf = make_hf(folder / "hf", **GQA)
    run_ranks(convert_rank, 1, config_of(folder))
    weights, pattern = load_file(hf / "model.safetensors"), Pattern(2, 4)
    shapes = linear_shapes(read_architecture(hf))
    scores = {name: weights[f"{name}.weight"].abs() for name in shapes}
    masks = {name: pattern.best(score_OI) for name, score_OI in scores.items()}
    path = folder / "masks" / "magnitude.safetensors"
    save_masks(
        path, masks, pattern, fingerprint=BaseModel(hf).fingerprints().exact, method="magnitude"
    )
    levels = {n: to_levels(to_codes(scores[n], masks[n], pattern)) for n in shapes}
    save_margins(margins_path(path), load_masks(path).content_sha256, shapes, levels.items())
    return folder


# The paper's start, from noise and a prior: masks move within a few steps.
PAPER = {
    "method": "categorical",
    "sampling": {"tau": (4, 0.05), "noise": 1.0, "initial_noise": True},
    "optimizer": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 0, "epsilon": (1e-8, 0)},
    "weight_norm": (1e-5, 1e-5),
}


def config_of(
    run_dir: Path, tp: int = 1, learn: Mapping[str, Any] | None = None, **parallel: Any
) -> Config:
    """Settings of a short fp32 run on such a folder; the global batch is 8 samples in micro-batches
    of 2.
    """
    section: dict[str, Any] = {
        **PAPER,
        "steps": 20,
        "micro_batch": 2,
        "global_batch": 8,
        "prior": {"mask": "magnitude", "margins": False},
    }
    for key, value in (learn or {}).items():
        section[key] = {**section[key], **value} if isinstance(section.get(key), Mapping) else value
    return build_config(
        {
            "run_dir": str(run_dir),
            "dtype": "fp32",
            "device": "cpu",
            "parallel": {"tp": tp, "threads": 1, "timeout_minutes": 2, **parallel},
            "data": {"seq_length": 32},
            "evaluate": {"window": 32},
            "learn": section,
        }
    )


class Chains:
    """Samples that can be learned from: each token follows from the last by one fixed rule, now and
    then at random.
    """

    def __init__(self, vocab: int = 512, length: int = 32, seed: int = 0) -> None:
        self.vocab, self.length, self.seed = vocab, length, seed

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        fresh = torch.randint(self.vocab, (self.length + 1,), generator=generator)
        keep = torch.rand(self.length + 1, generator=generator) < 0.8
        tokens = fresh.tolist()
        for place in range(1, self.length + 1):
            if keep[place]:
                tokens[place] = (5 * tokens[place - 1] + 17) % 64
        return {"tokens": torch.tensor(tokens[:-1]), "labels": torch.tensor(tokens[1:])}


def gather_hf(
    local: Mapping[str, torch.Tensor], masked_model: MaskedModel, mesh: Mesh
) -> dict[str, torch.Tensor]:
    """Whole tensors by HF module name from every rank's shards by Megatron name: masks (O, I) or
    logits (O, C, G).
    """
    table, whole = linear_rules(masked_model.arch), {}
    for name, tensor in local.items():
        rule = table[name]
        parts = rule.to_hf(rule.join(mesh.gather_over_tp(tensor.detach())))
        whole.update({hf.removesuffix(".weight"): part.clone() for hf, part in parts.items()})
    return whole


def gather_masks(
    local: Mapping[str, torch.Tensor], arch: Architecture, mesh: Mesh
) -> dict[str, torch.Tensor]:
    """Whole masks by HF module name, (O, I) bool, on every rank, from the shards by Megatron
    name.
    """
    table, whole = linear_rules(arch), {}
    for name, mask_OI in local.items():
        shards = mesh.gather_over_tp(mask_OI.to(torch.uint8))
        parts = table[name].to_hf(table[name].join(shards))
        whole.update({hf.rpartition(".")[0]: part.bool() for hf, part in parts.items()})
    return whole


def logits_of(linear: MaskedLinear) -> torch.nn.Parameter:
    """The mask logits of a linear that has some."""
    assert linear.mask_logits is not None
    return linear.mask_logits


def gather_logits(masked_model: MaskedModel, mesh: Mesh) -> dict[str, torch.Tensor]:
    """The mask logits of the whole model by HF module name."""
    return gather_hf(
        {name: logits_of(linear) for name, linear in masked_model.linears.items()},
        masked_model,
        mesh,
    )
