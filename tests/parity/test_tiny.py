"""Random tiny Llamas: logits and perplexity through Megatron equal those of transformers, at TP 1
and 2; wrong readings do not.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megamask.weights.architecture import Architecture
from tests.parallel.ranks import run_ranks
from tests.parity.megatron import LOGITS, Output, outputs_of_folders, transformers_output

LENGTH, VOCAB = 96, 131  # an odd vocabulary is padded at TP 2
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa, untied": {"num_key_value_heads": 2},
    "tied, linear rope": {
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    },
    "gqa, biases, llama3 rope": {
        "num_key_value_heads": 4,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": LLAMA3,
    },
    "wide heads, other theta": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("llamas")
    return [
        make_llama(root / str(number), number, changes)
        for number, changes in enumerate(VARIANTS.values())
    ]


def make_llama(folder: Path, seed: int, changes: dict[str, Any]) -> Path:
    """Large random weights, norms and biases, so that everything shows in the logits."""
    torch.manual_seed(seed)
    plain: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
    }
    plain |= {"num_key_value_heads": 8, "vocab_size": VOCAB, "max_position_embeddings": 128}
    model = LlamaForCausalLM(LlamaConfig(**(plain | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokens_NS() -> torch.Tensor:
    return torch.randint(VOCAB, (4, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def expected(folders: list[Path], tokens_NS: torch.Tensor) -> list[Output]:
    return [transformers_output(folder, tokens_NS) for folder in folders]


def test_outputs_are_those_of_transformers_at_tp_1(
    folders: list[Path], tokens_NS: torch.Tensor, expected: list[Output]
) -> None:
    assert_equal(outputs_of_folders(0, folders, tokens_NS, 1), expected)


def test_outputs_are_those_of_transformers_at_tp_2(
    folders: list[Path], tokens_NS: torch.Tensor, expected: list[Output]
) -> None:
    for found in run_ranks(outputs_of_folders, 2, folders, tokens_NS, 2):
        assert_equal(found, expected)


def assert_equal(found: list[Output], expected: list[Output]) -> None:
    for variant, one, other in zip(VARIANTS, found, expected, strict=True):
        print(
            f"{variant}: logits differ by {one.distance(other):.1e} of their scale, "
            f"perplexity {one.perplexity:.6g}, {other.perplexity:.6g}"
        )
        assert one.agrees(other), variant


class SwappedKeysAndValues:
    """A checkpoint whose k_proj and v_proj are read as each other."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def read(self, name: str, rows: slice, cols: slice | None = None) -> torch.Tensor:
        other = {"k_proj": "v_proj", "v_proj": "k_proj"}
        swapped = ".".join(other.get(part, part) for part in name.split("."))
        block: torch.Tensor = self.reader.read(swapped, rows, cols)
        return block


def swap_keys_and_values(arch: Architecture, reader: Any) -> tuple[Architecture, Any]:
    return arch, SwappedKeysAndValues(reader)


def change_theta(arch: Architecture, reader: Any) -> tuple[Architecture, Any]:
    (rope,) = arch.ropes
    return replace(arch, ropes=(replace(rope, theta=2 * rope.theta),)), reader


def forget_scaling(arch: Architecture, reader: Any) -> tuple[Architecture, Any]:
    return replace(arch, ropes=(replace(arch.ropes[0], scaling=None),)), reader


@pytest.mark.parametrize("wrong", [swap_keys_and_values, change_theta])
def test_a_wrong_reading_shows(
    wrong: Any, folders: list[Path], tokens_NS: torch.Tensor, expected: list[Output]
) -> None:
    for found, other in zip(
        outputs_of_folders(0, folders, tokens_NS, 1, wrong), expected, strict=True
    ):
        assert found.distance(other) > 10 * LOGITS and not found.agrees(other)


def test_a_forgotten_rope_scaling_shows(
    folders: list[Path], tokens_NS: torch.Tensor, expected: list[Output]
) -> None:
    scaled = [
        number
        for number, changes in enumerate(VARIANTS.values())
        if "factor" in changes.get("rope_parameters", {})
    ]
    assert len(scaled) == 2
    found = outputs_of_folders(
        0, [folders[number] for number in scaled], tokens_NS, 1, forget_scaling
    )
    for number, output in zip(scaled, found, strict=True):
        assert output.distance(expected[number]) > 10 * LOGITS and not output.agrees(
            expected[number]
        )
