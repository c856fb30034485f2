"""SmolLM2-135M from its GGUF: converted at TP 1 and 3, it says what transformers says and comes
back bit for bit.
"""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import pytest
import torch

from megamask.weights.from_gguf import unpack
from megamask.weights.hf_files import open_checked
from tests.parallel.ranks import run_ranks
from tests.parity.megatron import (
    Output,
    convert_folder,
    hf_tensors,
    output_of_weights,
    transformers_output,
)
from tests.parity.real_models import find_model

WINDOWS, LENGTH = 2, 96

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # a slow download is part of it


@pytest.fixture(scope="module")
def gguf(request: pytest.FixtureRequest) -> Path:
    return find_model("smollm2-135m", request.config.cache)


@pytest.fixture(scope="module")
def hf(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    unpack(gguf, folder)
    return folder


def test_the_tokenizer_is_that_of_the_header(hf: Path) -> None:
    """Digits are apart from the white space before them; transformers 5.17 took BOS for EOS."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf, local_files_only=True)
    found = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert found == (1, 2, 2) and tokenizer.unk_token_id == 0
    assert tokenizer("Hello world! 123")["input_ids"] == [19556, 905, 17, 216, 33, 34, 35]
    spaces = tokenizer("a   ")["input_ids"]
    assert tokenizer("a   1")["input_ids"] == [*spaces, 33]


@pytest.fixture(scope="module")
def tokens_NS(hf: Path) -> torch.Tensor:
    """English prose about Python."""
    from transformers import AutoTokenizer

    text = "\n\n".join(
        pydoc_data.topics.topics[topic] for topic in ("assignment", "booleans", "calls", "class")
    )
    tokens = AutoTokenizer.from_pretrained(hf, local_files_only=True)(text)["input_ids"]
    return torch.tensor(tokens[: WINDOWS * LENGTH]).reshape(WINDOWS, LENGTH)


@pytest.fixture(scope="module")
def expected(hf: Path, tokens_NS: torch.Tensor) -> Output:
    return transformers_output(hf, tokens_NS)


# Of one rank, the random models of test_families.py hold the rule.
LAYOUTS = [
    pytest.param(1, id="tp 1", marks=pytest.mark.nightly),
    pytest.param(3, id="tp 3"),
]


@pytest.fixture(scope="module", params=LAYOUTS)
def converted(
    request: pytest.FixtureRequest, hf: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path]:
    """(TP, run directory with weights converted at that TP)."""
    tp: int = request.param
    run_dir = tmp_path_factory.mktemp(f"tp{tp}")
    run_ranks(convert_folder, tp, hf, run_dir, tp)
    return tp, run_dir


def test_outputs_are_those_of_transformers(
    converted: tuple[int, Path], tokens_NS: torch.Tensor, expected: Output
) -> None:
    tp, run_dir = converted
    # The model reads English; two models of noise would agree with each other too.
    assert 5 < expected.perplexity < 100
    for found in run_ranks(output_of_weights, tp, run_dir / "weights", tokens_NS, tp):
        print(
            f"logits differ by {found.distance(expected):.1e} of their scale, "
            f"perplexity {found.perplexity:.6g}, {expected.perplexity:.6g}"
        )
        assert found.agrees(expected)


def test_the_round_trip_is_bitwise(converted: tuple[int, Path], hf: Path) -> None:
    back = hf_tensors(converted[1] / "weights")
    with open_checked(hf) as source:
        assert back.keys() == set(source.names())
        for name, tensor in back.items():
            original = source.tensor(name)
            assert tensor.dtype == original.dtype == torch.bfloat16
            assert torch.equal(tensor.view(torch.int16), original.view(torch.int16)), name
