"""Snapshots as masks: what two ranks saved, one process reads and any layout and distribution can
start from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megamask.learn.gumbel import GradientLearner
from megamask.learn.learned_mask import save_learned_mask
from megamask.learn.masked_model import build_masked_model
from megamask.learn.snapshot import Progress, Snapshots
from megamask.masks.file import load_masks, save_masks
from megamask.masks.from_snapshot import load_snapshot
from megamask.parallel.mesh import Mesh, start
from megamask.prepare.run_inputs import LearnInputs
from megamask.sparsity.pattern import Pattern
from megamask.weights.architecture import read_architecture
from tests.parallel.ranks import meet_again, run_ranks
from tests.parallel.tiny import config_of, gather_masks

pytestmark = pytest.mark.slow
Masks = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Kind:
    """How a run holds its logits."""

    pattern: str
    method: str
    logits: str


KINDS = {
    "categorical": Kind("2:4", "categorical", "fp32"),
    "subset": Kind("4:8", "subset", "fp32"),
    "categorical-bf16": Kind("2:4", "categorical", "bf16"),
    "subset-bf16": Kind("2:4", "subset", "bf16"),
}
HEIR = {
    "categorical": "subset",
    "subset": "categorical",
}  # the method of the run that starts from the snapshot


def config(run_dir: Path, tp: int, kind: Kind, prior: str | None, method: str) -> Any:
    learn = {
        "method": method,
        "state": {"logits": kind.logits},
        "prior": {"mask": prior, "margins": True},
        "sampling": {"initial_noise": False},
    }
    made = config_of(run_dir, tp, learn)
    return made.model_copy(update={"pattern": kind.pattern})


def hard_codes(masked_model: Any, mesh: Mesh) -> Masks:
    return gather_masks(
        {name: linear.hard_mask() for name, linear in masked_model.linears.items()},
        masked_model.arch,
        mesh,
    )


def save_all(rank: int, run_dir: Path, folder: Path, tp: int) -> dict[str, tuple[Masks, Masks]]:
    """By kind: the winners of random logits with many ties, and the masks that this rank reads from
    their snapshot.
    """
    found = {}
    for name, kind in KINDS.items():
        settings = config(run_dir, tp, kind, None, kind.method)
        with start(settings) as mesh:
            masked_model = build_masked_model(LearnInputs(settings), mesh)
            for number, logits in enumerate(masked_model.mask_logits):
                generator = torch.Generator().manual_seed(100 * rank + number)
                logits.data.copy_(
                    torch.randint(-3, 4, logits.shape, generator=generator) / 64
                )  # exact in bf16
            snapshots = Snapshots(
                folder / name,
                settings,
                mesh,
                masked_model,
                GradientLearner(settings, mesh, masked_model),
            )
            snapshots.save(Progress(step=7))
            save_learned_mask(folder / f"{name}.safetensors", masked_model, mesh, {"a": 1}, {})
            found[name] = (
                hard_codes(masked_model, mesh),
                dict(load_snapshot(folder / name, masked_model.arch)),
            )
        meet_again()
    return found


def start_all(rank: int, run_dir: Path, folder: Path, tp: int) -> dict[str, Masks]:
    """By kind: the winners of a run whose prior is the snapshot."""
    found = {}
    for name, kind in KINDS.items():
        settings = config(run_dir, tp, kind, str(folder / name), HEIR[kind.method])
        with start(settings) as mesh:
            found[name] = hard_codes(build_masked_model(LearnInputs(settings), mesh), mesh)
        meet_again()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("snapshots")


@pytest.fixture(scope="module")
def saved(tiny_run: Path, folder: Path) -> dict[str, tuple[Masks, Masks]]:
    ours, theirs = run_ranks(save_all, 2, tiny_run, folder, 2)
    assert all(same(ours[name][1], theirs[name][1]) for name in KINDS)
    found: dict[str, tuple[Masks, Masks]] = ours
    return found


def same(one: Masks, other: Masks) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_a_snapshot_of_two_ranks_is_read_as_their_winners(
    tiny_run: Path, folder: Path, saved: dict[str, Any], kind: str
) -> None:
    expected, read_by_a_rank = saved[kind]
    masks = load_snapshot(folder / kind / "step-00000007", read_architecture(tiny_run / "hf"))
    masks.verify()
    assert same(dict(masks), expected) and same(read_by_a_rank, expected)
    assert str(masks.pattern) == KINDS[kind].pattern and masks.meta["data"]["step"] == 7
    assert {name: masks.shape(name) for name in masks} == {
        name: tuple(mask.shape) for name, mask in expected.items()
    }
    name = next(iter(expected))
    assert torch.equal(masks.index(name), masks.pattern.index_of(expected[name]))
    assert not same(
        {**dict(masks), name: expected[name].roll(1, dims=0)}, expected
    )  # the comparison sees rows that are out of place


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_file_of_two_ranks_has_the_bytes_of_whole_masks(
    folder: Path, saved: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    """From hard codes that stay sharded until a linear is written, and from bool masks at once."""
    masks, pattern = saved[kind][0], Pattern.parse(KINDS[kind].pattern)
    fingerprint, *copies = load_masks(folder / f"{kind}.safetensors").fingerprints

    def written(masks: Masks) -> bytes:
        path = tmp_path / "whole.safetensors"
        save_masks(
            path,
            masks,
            pattern,
            fingerprint=fingerprint,
            method="learned",
            data={"a": 1},
            evaluation={},
            float16_fingerprints=copies,
        )
        return path.read_bytes()

    found = (folder / f"{kind}.safetensors").read_bytes()
    assert found == written(masks)
    name = next(iter(masks))
    assert found != written({**masks, name: masks[name].roll(1, dims=0)})


@pytest.mark.parametrize("tp", [1, 2])
def test_a_run_starts_from_it_in_any_layout_and_method(
    tiny_run: Path, folder: Path, saved: dict[str, Any], tp: int
) -> None:
    started = run_ranks(start_all, tp, tiny_run, folder, tp)[0]
    for kind in KINDS:
        assert same(started[kind], saved[kind][0]), kind
