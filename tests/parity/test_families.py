"""Every family: logits and perplexity through Megatron equal those of transformers at TP 1, TP 2
and TP 2 with sequence parallel, the tensors come back bit for bit, and wrong readings show.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megamask.model.build import build_model, model_rules
from megamask.model.checkpoint import fill_from_hf
from megamask.parallel.mesh import start
from megamask.weights.architecture import read_architecture
from megamask.weights.hf_files import open_checked
from tests.parallel.ranks import meet_again, run_ranks
from tests.parity.megatron import LOGITS, Output, output, settings, transformers_output
from tests.parity.variants import LENGTH, VARIANTS, VOCAB, make

NAMES = list(VARIANTS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {
        name: make(root / str(seed), variant, seed)
        for seed, (name, variant) in enumerate(VARIANTS.items())
    }


@pytest.fixture(scope="module")
def tokens_NS() -> torch.Tensor:
    return torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path], tokens_NS: torch.Tensor) -> dict[str, Output]:
    return {name: transformers_output(folder, tokens_NS) for name, folder in folders.items()}


def outputs(
    rank: int, folders: dict[str, Path], tokens_NS: torch.Tensor, tp: int, splits: tuple[bool, ...]
) -> list[dict[str, Output]]:
    """Outputs of every model, without and with sequence parallel as ``splits`` says. The first
    models are also turned back into HF tensors, which must be those of the files.
    """
    found = []
    for split in splits:
        config = settings(tp, sequence_parallel=split)
        one = {}
        with start(config) as mesh:
            for name, folder in folders.items():
                arch = read_architecture(folder)
                with open_checked(folder) as reader:
                    model = build_model(config, arch, mesh)
                    fill_from_hf(model, arch, mesh, reader)
                if not split:
                    back = {}
                    parameters = dict(model.named_parameters())
                    for rule in model_rules(arch, tp):
                        shards = mesh.gather_over_tp(parameters[rule.megatron])
                        back.update(rule.to_hf(rule.join(shards)))
                    assert same(back, load_file(folder / "model.safetensors")), name
                one[name] = output(model, arch, mesh, tokens_NS)
        found.append(one)
        if tp > 1:
            meet_again()
    return found


def same(found: dict[str, torch.Tensor], stored: dict[str, torch.Tensor]) -> bool:
    """Names, dtypes and bits."""
    return found.keys() == stored.keys() and all(
        found[name].dtype == stored[name].dtype and torch.equal(found[name], stored[name])
        for name in stored
    )


def check(found: dict[str, Output], expected: dict[str, Output]) -> None:
    for name, one in found.items():
        print(f"{name}: logits differ by {one.distance(expected[name]):.1e} of their scale")
    wrong = [name for name, one in found.items() if not one.agrees(expected[name])]
    assert not wrong


def test_outputs_are_those_of_transformers_at_tp_1(
    folders: dict[str, Path], tokens_NS: torch.Tensor, expected: dict[str, Output]
) -> None:
    check(outputs(0, folders, tokens_NS, 1, (False,))[0], expected)


def test_outputs_are_those_of_transformers_at_tp_2(
    folders: dict[str, Path], tokens_NS: torch.Tensor, expected: dict[str, Output]
) -> None:
    for plain, split in run_ranks(outputs, 2, folders, tokens_NS, 2, (False, True)):
        check(plain, expected)
        check(split, expected)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_readings_show(
    name: str, folders: dict[str, Path], tokens_NS: torch.Tensor, expected: dict[str, Output]
) -> None:
    config, arch = settings(1), read_architecture(folders[name])
    with start(config) as mesh, open_checked(folders[name]) as reader:
        for what, change in VARIANTS[name].wrong.items():
            wrong = change(arch)
            assert wrong != arch
            model = build_model(config, wrong, mesh)
            fill_from_hf(model, arch, mesh, reader)
            found = output(model, wrong, mesh, tokens_NS)
            distance = found.distance(expected[name])
            print(f"{name}, {what}: {distance:.1e}")
            assert distance > 5 * LOGITS and not found.agrees(expected[name]), what
