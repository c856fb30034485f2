"""HybridModel in the place of GPTModel: the same bits, names and keys for all that families have.

Megatron-Core has HybridModel from 0.19 on; older versions skip these tests.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megamask.config import Config
from megamask.model.build import build_model, masked_linears
from megamask.model.checkpoint import fill_from_hf, sharded_state
from megamask.model.model_class import VARIABLE
from megamask.parallel.mesh import Mesh, start
from megamask.weights.architecture import Architecture, read_architecture
from megamask.weights.hf_files import open_checked
from megamask.weights.source import WeightSource
from tests.parallel.ranks import run_ranks
from tests.parity.megatron import settings
from tests.parity.variants import LENGTH, VARIANTS, VOCAB, make

HYBRID = "megatron.core.models.hybrid"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(HYBRID) is None, reason="this Megatron-Core has no HybridModel"
)
# Windows, two rotary embeddings and norms on every side; parallel parts; a table of positions;
# factors; layers without rotation.
CHOSEN = ("gemma3", "gpt_neox parallel", "gpt2", "granite", "smollm3")
SPLIT = ("gemma3",)


@dataclass(frozen=True)
class Seen:
    """What a model shows: its class, the keys and local shapes of its tensors on disk, its logits,
    and the gradient of every linear's weight.
    """

    bases: list[str]
    keys: dict[str, tuple[Any, ...]]
    logits: torch.Tensor
    gradients: dict[str, torch.Tensor]


def seen(
    kind: str,
    config: Config,
    arch: Architecture,
    mesh: Mesh,
    reader: WeightSource,
    tokens_NS: torch.Tensor,
) -> Seen:
    with patch.dict("os.environ", {VARIABLE: kind}):
        model = build_model(config, arch, mesh)
    fill_from_hf(model, arch, mesh, reader)
    linears = masked_linears(model)
    for linear in linears.values():
        linear.weight.requires_grad_(True)
    model.token_losses(tokens_NS, tokens_NS.roll(-1, 1)).mean().backward()
    with torch.no_grad():
        logits = model.full_logits(tokens_NS, arch.vocab)
    return Seen(
        [one.__name__ for one in type(model).__mro__],
        {
            name: (one.key, one.local_shape, one.global_shape, one.global_offset)
            for name, one in sharded_state(model).items()
            if hasattr(one, "local_shape")
        },
        logits,
        {
            name: one.weight.grad.clone()  # type: ignore[union-attr]
            for name, one in linears.items()
        },
    )


def check(
    rank: int, folders: dict[str, Path], tokens_NS: torch.Tensor, tp: int, recompute: bool | str
) -> int:
    """Compare the two classes on every model; returns the number of gradients compared."""
    count = 0
    config = settings(tp, sequence_parallel=tp > 1, recompute=recompute)
    with start(config) as mesh:
        for name, folder in folders.items():
            arch = read_architecture(folder)
            with open_checked(folder) as reader:
                gpt, hybrid = (
                    seen(kind, config, arch, mesh, reader, tokens_NS) for kind in ("gpt", "hybrid")
                )
            assert "GPTModel" in gpt.bases and "HybridModel" not in gpt.bases
            assert "HybridModel" in hybrid.bases and "GPTModel" not in hybrid.bases
            assert hybrid.keys == gpt.keys and len(gpt.keys) > 4, name
            assert torch.equal(hybrid.logits, gpt.logits), name
            assert hybrid.gradients.keys() == gpt.gradients.keys()
            for linear, gradient in gpt.gradients.items():
                assert torch.equal(hybrid.gradients[linear], gradient), (name, linear)
                assert gradient.abs().max() > 0
                count += 1
    return count


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {
        name: make(root / str(seed), variant, seed)
        for seed, (name, variant) in enumerate(VARIANTS.items())
        if name in CHOSEN
    }


@pytest.fixture(scope="module")
def tokens_NS() -> torch.Tensor:
    return torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def test_every_part_of_a_family_has_the_same_bits(
    folders: dict[str, Path], tokens_NS: torch.Tensor
) -> None:
    """All layers are computed again in the backward pass, by Megatron's own code for the stack."""
    assert check(0, folders, tokens_NS, 1, recompute=True) > 4 * len(CHOSEN)


def test_a_split_model_has_the_same_bits(folders: dict[str, Path], tokens_NS: torch.Tensor) -> None:
    """TP 2 with sequence parallel."""
    chosen = {name: folders[name] for name in SPLIT}
    counts = run_ranks(check, 2, chosen, tokens_NS, 2, "mlp")
    assert min(counts) > 4 * len(SPLIT)
