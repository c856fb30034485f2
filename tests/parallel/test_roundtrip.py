"""Hugging Face -> Megatron at TP 1, 2, 4, 8 -> Hugging Face: equal in keys, shapes, dtypes and
bits.
"""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from megamask.config import Config, run_paths
from megamask.verbs import convert
from tests.parallel.ranks import meet_again, run_ranks
from tests.parallel.tiny import GQA, TPS, config_of, make_hf
from tests.parity.megatron import hf_tensors

pytestmark = pytest.mark.slow
PLAIN = {**GQA, "vocab_size": 512}
# 509 is prime: at TP 2, 4 and 8 the vocabulary is padded, to 510, 512 and 512 rows.
BIASED = {**GQA, "vocab_size": 509, "attention_bias": True, "mlp_bias": True}
# 9 rows over 8 ranks: 2 a rank, so ranks 5, 6 and 7 hold nothing but padding.
FEW_WORDS = {**GQA, "vocab_size": 9, "num_hidden_layers": 1}
MODELS = {"plain": PLAIN, "biased": BIASED, "few-words": FEW_WORDS}


def convert_all(rank: int, configs: list[Config]) -> list[str]:
    """The verb convert on every model; the command lines of the processes that a save left."""
    for config in configs:
        convert.run(config)
        meet_again()
    lines = [" ".join(child.cmdline()) for child in psutil.Process().children()]
    return [line for line in lines if "multiprocessing.resource_tracker" not in line]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: make_hf(root / name, seed, torch.bfloat16, **shape)
        for seed, (name, shape) in enumerate(MODELS.items())
    }


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    if found.keys() != expected.keys():
        return False
    return all(
        found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name])
        for name in expected
    )


@pytest.fixture(scope="module")
def round_trips(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int], dict[str, torch.Tensor]]:
    configs = {}
    for tp in TPS:
        for name, hf in folders.items():
            config = config_of(tmp_path_factory.mktemp(f"{name}-{tp}"), tp)
            configs[name, tp] = config.model_copy(
                update={"model": config.model.model_copy(update={"hf": str(hf)})}
            )
    for tp in TPS:
        left = run_ranks(convert_all, tp, [configs[name, tp] for name in folders])
        assert left == [[]] * tp  # Megatron's writer would keep a process on every rank
    return {key: hf_tensors(run_paths(config).weights) for key, config in configs.items()}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("tp", TPS)
def test_what_comes_back_is_what_went_in(
    tp: int,
    name: str,
    folders: dict[str, Path],
    round_trips: dict[tuple[str, int], dict[str, torch.Tensor]],
) -> None:
    original = load_file(folders[name] / "model.safetensors")
    assert {tensor.dtype for tensor in original.values()} == {torch.bfloat16}
    assert any(key.endswith("bias") for key in original) == (name == "biased")
    found = round_trips[name, tp]
    assert same(found, original)
    # The comparison sees one bit, a swap of two equally shaped parts, a dtype and a missing name.
    key = "model.layers.0.mlp.gate_proj.weight"
    flipped = original[key].clone().view(torch.int16)
    flipped[0, 0] ^= 1
    wrong = [
        {key: flipped.view(torch.bfloat16)},
        {key: original[key.replace("gate", "up")]},
        {key: original[key].float()},
        {"extra": original[key]},
    ]
    assert not any(same({**found, **change}, original) for change in wrong)
