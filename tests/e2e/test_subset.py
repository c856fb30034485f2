"""One logit per pair at 16:32:pair, every verb: 8 of 16 pairs, 12,870 candidates a group, of which
no step needs a table.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megamask import load_masks
from megamask.sparsity.pattern import Pattern
from tests.e2e.program import Finished, contents, here, in_process, refusal
from tests.masks import is_valid

pytestmark = pytest.mark.slow

PATTERN = Pattern(16, 32, 2)
LINEAR = (f"pattern={PATTERN}", "learn.method=subset")
METHODS = ("magnitude", "wanda", "sparsegpt", "sparsegpt_update")
Settings = Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def pipeline(
    prepared: Path, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Finished]]:
    """A run folder in which every verb has run at 16:32:pair, and what they said."""
    run_dir = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("linear") / "run"))
    shutil.rmtree(run_dir / "masks")  # of 2:4
    said = {
        verb: here(verb, *settings(run_dir), *LINEAR)
        for verb in ("prune", "learn", "export", "evaluate", "report", "inspect")
    }
    return run_dir, said


@pytest.mark.parametrize("method", [*METHODS, "learned"])
def test_masks_keep_8_of_16_pairs(pipeline: tuple[Path, dict[str, Finished]], method: str) -> None:
    masks = load_masks(pipeline[0] / "masks" / f"{method}.safetensors")
    masks.verify()
    assert masks.pattern == PATTERN and len(masks) == 2 * 7
    assert all(is_valid(PATTERN, mask) for mask in masks.values())


def test_learning_moves_the_mask_and_helps(pipeline: tuple[Path, dict[str, Finished]]) -> None:
    run_dir = pipeline[0]
    learned, prior = (
        load_masks(run_dir / "masks" / f"{method}.safetensors")
        for method in ("learned", "sparsegpt")
    )
    assert any(not torch.equal(learned[name], prior[name]) for name in learned)
    perplexity = json.loads((run_dir / "results.json").read_text())["perplexity"]
    assert all(
        perplexity["learned"][domain] < perplexity["sparsegpt"][domain]
        for domain in ("prose", "code")
    )


def test_the_export_holds_the_mask_and_inspect_names_the_pattern(
    pipeline: tuple[Path, dict[str, Finished]], model: Path
) -> None:
    from safetensors.torch import load_file

    run_dir, said = pipeline
    masks, written, dense = (
        load_masks(run_dir / "masks" / "learned.safetensors"),
        load_file(run_dir / "export" / "model.safetensors"),
        load_file(model / "model.safetensors"),
    )
    for name, mask in masks.items():
        assert torch.equal(
            written[f"{name}.weight"], torch.where(mask, dense[f"{name}.weight"], 0.0)
        ), name
    assert "16:32:pair (12870 candidates a group)" in said["inspect"].stdout
    assert "learned.safetensors: valid" in said["inspect"].stdout
    assert (run_dir / "report.html").exists()


def test_a_second_run_changes_nothing_and_another_method_does_not_go_on(
    pipeline: tuple[Path, dict[str, Finished]], prepared: Path, settings: Settings, tmp_path: Path
) -> None:
    before = contents(pipeline[0] / "masks")
    assert in_process("learn", *settings(pipeline[0]), *LINEAR).code == 0
    assert contents(pipeline[0] / "masks") == before

    run_dir = Path(shutil.copytree(prepared, tmp_path / "run"))  # 2:4, where both are possible
    assert in_process("learn", *settings(run_dir), "learn.method=subset").code == 0
    message = refusal(in_process("learn", *settings(run_dir), "learn.method=categorical"))
    assert "learn.method = 'categorical'" in message and "was started with 'subset'" in message


def test_more_members_than_linear_takes(tmp_path: Path, settings: Settings) -> None:
    message = refusal(
        in_process("learn", *settings(tmp_path / "run"), "pattern=2:64", "learn.method=subset")
    )
    assert all(
        words in message
        for words in ("pattern = '2:64'", "takes M up to 32", "Choose a pattern with M <= 32")
    )
    assert contents(tmp_path) == {}
