"""A distribution, an update rule and a method from outside the package learn through every verb,
after one line each in the registries.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megamask import load_masks
from megamask.learn.gradient_method import GradientMethod
from megamask.learn.methods import METHODS
from megamask.optim.optimizers import UPDATE_RULES
from megamask.sparsity.distributions import DISTRIBUTIONS
from tests.e2e import toy
from tests.e2e.program import in_process, refusal

SIGN = ["learn.method=sigmoid", "learn.optimizer.kind=sign", "learn.optimizer.lr=5e-3"]
SHUFFLE = ["learn.method=shuffle"]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DISTRIBUTIONS, "sigmoid", toy.SIGMOID)
    monkeypatch.setitem(UPDATE_RULES, "sign", toy.SignRule())
    monkeypatch.setitem(METHODS, "sigmoid", GradientMethod(toy.SIGMOID))
    monkeypatch.setitem(METHODS, "shuffle", toy.ShuffleMethod())


def learned(run_dir: Path, name: str = "learned") -> dict[str, torch.Tensor]:
    masks = load_masks(run_dir / "masks" / f"{name}.safetensors")
    masks.verify()
    return dict(masks)


def test_a_distribution_and_an_update_rule_learn(
    run_dir: Path, settings: Callable[[Path], list[str]]
) -> None:
    done = in_process("learn", *settings(run_dir), *SIGN)
    assert done.code == 0, done.stderr
    prior, found = learned(run_dir, "sparsegpt"), learned(run_dir)
    assert any(not torch.equal(found[name], prior[name]) for name in found)
    perplexity = [
        json.loads(line)["perplexity"]
        for line in (run_dir / "learn" / "metrics.jsonl").read_text().splitlines()
        if json.loads(line)["kind"] == "evaluation"
    ]
    assert all(perplexity[-1][domain] < perplexity[0][domain] for domain in perplexity[0])


def test_a_learner_of_ones_own_resumes_and_hands_on(
    run_dir: Path, settings: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    """Four shifts of groups of four bring every mask back: also over a resume after two."""
    run = [*settings(run_dir), *SHUFFLE, "learn.snapshot.every=2"]
    assert in_process("learn", *run).code == 0
    prior = learned(run_dir, "sparsegpt")
    assert all(torch.equal(mask, prior[name]) for name, mask in learned(run_dir).items())
    # Back to the snapshot of step 2, where the mask is another, and on from there.
    shutil.rmtree(run_dir / "learn" / "snapshots" / "step-00000004")
    (run_dir / "masks" / "learned.safetensors").unlink()
    snapshot = run_dir / "learn" / "snapshots" / "step-00000002"
    out = tmp_path / "two.safetensors"
    assert in_process("extract", *run, str(snapshot), str(out)).code == 0
    shifted = dict(load_masks(out))
    for name, mask in shifted.items():
        expected = prior[name].unflatten(1, (-1, 4)).roll(2, dims=2).flatten(1)
        assert torch.equal(mask, expected)
    assert in_process("learn", *run).code == 0
    assert all(torch.equal(mask, prior[name]) for name, mask in learned(run_dir).items())


def test_plan_counts_what_the_method_says(capsys: pytest.CaptureFixture[str]) -> None:
    from megamask.__main__ import main

    model = ["plan", "--model", "smollm2-135m", "--gpu", "cpu"]
    assert main([*model, "learn.method=shuffle"]) == 0
    text = capsys.readouterr().out
    weights = 106_168_320  # prunable, of SmolLM2-135M
    assert "| mask logits" in text and f"{4 * weights / 2**30:,.2f}" in text
    assert "optimizer moments" not in text and "gradients" not in text.split("time of one step")[0]


def test_without_the_line_it_is_unknown(
    run_dir: Path, settings: Callable[[Path], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(METHODS, "shuffle")
    done = in_process("learn", *settings(run_dir), *SHUFFLE)
    assert "one of subset, categorical, maskpro, sigmoid" in refusal(done)
