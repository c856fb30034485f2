"""The factor of the embedding in bf16, in which transformers rounds Gemma's factor and not
Granite's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megamask.config.load import build_config
from megamask.model.build import build_model
from megamask.model.checkpoint import fill_from_hf
from megamask.parallel.mesh import start
from megamask.weights.architecture import Architecture, read_architecture
from megamask.weights.hf_files import open_checked
from tests.parity.variants import LENGTH, VARIANTS, VOCAB, make


def embedded(folder: Path, arch: Architecture, tokens_BS: torch.Tensor) -> torch.Tensor:
    """(S, B, H), as the first layer gets it."""
    config = build_config({"device": "cpu", "dtype": "bf16", "parallel": {"threads": 1}})
    with start(config) as mesh, open_checked(folder) as reader:
        model = build_model(config, arch, mesh)
        fill_from_hf(model, arch, mesh, reader)
        return model.embedding(input_ids=tokens_BS, position_ids=None)


def embedded_by_transformers(folder: Path, tokens_BS: torch.Tensor) -> torch.Tensor:
    """(B, S, H): the input of the first layer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    found: torch.Tensor = model(tokens_BS, output_hidden_states=True).hidden_states[0]
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "granite"])
def test_the_embedding_has_the_bits_of_transformers(name: str, tmp_path: Path) -> None:
    # Factors that bf16 does not hold: the root of 96, and 6.01.
    variant = VARIANTS[name]
    odd = {"embedding_multiplier": 6.01} if name == "granite" else {"hidden_size": 96}
    folder = make(tmp_path / "model", replace(variant, keys=variant.keys | odd), 0)
    tokens_BS = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    arch = read_architecture(folder)
    theirs = embedded_by_transformers(folder, tokens_BS).transpose(0, 1)
    assert torch.equal(embedded(folder, arch, tokens_BS), theirs)
    assert arch.rounds_embedding_scale == (name != "granite")
    other = replace(arch, rounds_embedding_scale=not arch.rounds_embedding_scale)
    assert not torch.equal(embedded(folder, other, tokens_BS), theirs)
