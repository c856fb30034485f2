"""Models of other families than Llama through every verb: converted, pruned, learned, exported and
measured.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import megamask
from tests.e2e.conftest import run_settings, save_tokenizer
from tests.e2e.program import here

pytestmark = pytest.mark.slow
WINDOW = 32
MODELS: dict[str, dict[str, Any]] = {
    # biases of queries, keys and values, a tied head
    "qwen2": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    # no gate, LayerNorm, biases everywhere, fused rows in the file, parallel parts
    "gpt_neox": {},
    # a table of positions, weights that the file holds as (in, out)
    "gpt2": {},
    "mistral": {"num_key_value_heads": 4, "sliding_window": 12},
    "qwen3": {"num_key_value_heads": 4, "head_dim": 16},
    "smollm3": {"num_key_value_heads": 4, "no_rope_layers": [1, 0]},
    "phi3": {"num_key_value_heads": 4, "sliding_window": 12},
    "granite": {"residual_multiplier": 0.5, "embedding_multiplier": 4.0, "logits_scaling": 2.0},
    "stablelm": {"num_key_value_heads": 4, "use_qkv_bias": True},
    "nemotron": {"num_key_value_heads": 4},
    "starcoder2": {"num_key_value_heads": 4, "sliding_window": 12},
    "gemma2": {"num_key_value_heads": 4, "head_dim": 16, "sliding_window": 12},
    "gemma3_text": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "olmo2": {},
    "mixtral": {"num_key_value_heads": 4, "num_local_experts": 4},
    # dense layers in between, an expert of every token
    "qwen2_moe": {
        "num_key_value_heads": 4,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "decoder_sparse_step": 2,
    },
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
}
ALWAYS = ("qwen2", "gpt_neox")
LEARN = ("prune.methods=[magnitude, wanda]", "learn.prior.mask=wanda", "learn.snapshot.every=4")


def make(folder: Path, model_type: str) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    if model_type == "gpt2":  # four times the hidden width
        del sizes["intermediate_size"]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**sizes, **MODELS[model_type]})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases would be zeros
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    save_tokenizer(folder, vocab_size=512)
    return folder


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name in ALWAYS else pytest.mark.nightly) for name in MODELS
    ],
)
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, corpus: Path
) -> tuple[Path, Path]:
    """The model and its run after every verb."""
    folder = tmp_path_factory.mktemp(request.param)
    hf = make(folder / "hf", request.param)
    for verb in ("convert", "tokenize", "prune", "learn", "export", "evaluate", "inspect"):
        here(verb, *run_settings(folder / "run", hf, corpus), *LEARN)
    return hf, folder / "run"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


def perplexity(hf: Path, run_dir: Path, domain: str) -> float:
    """The protocol in plain numpy, torch and transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        hf, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    stream = np.fromfile(run_dir / "shards" / domain / "heldout.bin", dtype=np.uint16)[:512]
    windows = torch.from_numpy(stream.astype(np.int64)).view(-1, WINDOW)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].double()
    targets = windows[:, 1:].flatten()
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets))


def test_the_exported_folder_is_what_was_measured(run: tuple[Path, Path]) -> None:
    hf, run_dir = run
    measured = json.loads((run_dir / "results.json").read_text())["perplexity"]
    for domain in ("prose", "code"):
        found = perplexity(run_dir / "export", run_dir, domain)
        assert found == pytest.approx(measured["learned"][domain], rel=5e-5)  # four digits
        dense = perplexity(hf, run_dir, domain)
        assert dense == pytest.approx(measured["dense"][domain], rel=5e-5)
        assert dense != pytest.approx(found, rel=1e-3)  # the protocol tells both apart


def test_the_export_has_the_names_and_dtypes_of_the_model(run: tuple[Path, Path]) -> None:
    hf, run_dir = run
    plain, exported = tensors(hf), tensors(run_dir / "export")
    assert sorted(plain) == sorted(exported)
    masks = megamask.load_masks(run_dir / "masks" / "learned.safetensors")
    for name, tensor in plain.items():
        mask = masks.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if mask is not None and "gpt2" in hf.parent.name:
            mask = mask.t()
        expected = tensor if mask is None else tensor.masked_fill(~mask, 0.0)
        assert exported[name].dtype == tensor.dtype and torch.equal(exported[name], expected)
    others = ("embed_tokens", "embed_in", "wte", "wpe", "lm_head", "embed_out", ".gate.", "_gate.")
    linears = {
        name.removesuffix(".weight")
        for name, tensor in plain.items()
        if tensor.ndim == 2 and not any(other in name for other in others)
    }
    assert set(masks) == linears


def test_the_masks_apply_to_the_model_in_memory(run: tuple[Path, Path]) -> None:
    from transformers import AutoModelForCausalLM

    hf, run_dir = run
    model = AutoModelForCausalLM.from_pretrained(hf)
    megamask.apply_masks(model, run_dir / "masks" / "learned.safetensors")
    exported = AutoModelForCausalLM.from_pretrained(run_dir / "export").state_dict()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in model.state_dict().items())
