"""The benchmark of one-shot pruning: both sides do the same work on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import oneshot
from benchmarks.plain_oneshot import best, sparsegpt
from megamask.sparsity.pattern import Pattern

WORDS = ("--device", "cpu", "--threads", "1", "--rounds", "1", "--hidden", "32", "--ffn", "48")


def test_both_sides_find_the_same_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In fp32 the sides differ by rounding alone, and no group of this model is a near-tie."""
    file = tmp_path / "figures.json"
    words = [*WORDS, "--layers", "1", "2", "--samples", "4", "--tokens", "24", "--dtype", "fp32"]
    assert oneshot.main([*words, "--json", str(file)]) == 0
    runs = json.loads(file.read_text())["figures"]["runs"]
    assert [(run["layers"], run["method"]) for run in runs] == [
        (layers, method) for layers in (1, 2) for method in oneshot.METHODS
    ]
    for run in runs:
        assert run["equal_groups"] == 1.0, run
        assert run["ratio"]["median"] > 0
        for side in oneshot.SIDES:
            assert len(run["seconds"][side]) == 1 and run["cpu_ms_a_layer"][side] > 0
    printed = capsys.readouterr().out
    assert "time of a layer of 2 over that of a layer of 1" in printed


def test_other_masks_show() -> None:
    one = {"linear": torch.tensor([[True, True, False, False], [True, False, True, False]])}
    other = {"linear": torch.tensor([[True, True, False, False], [False, True, True, False]])}
    assert oneshot.equal_groups(one, one, 4) == 1.0
    assert oneshot.equal_groups(one, other, 4) == 0.5


def test_a_real_model_is_cut_to_its_first_layers(tmp_path: Path) -> None:
    options = oneshot.read_options([*WORDS, "--dtype", "fp32"])
    whole = oneshot.write_model(options, tmp_path / "whole", 3)
    options.hf = whole
    cut = oneshot.write_model(options, tmp_path / "cut", 2)
    assert json.loads((cut / "config.json").read_text())["num_hidden_layers"] == 2


def test_the_plain_update_makes_up_for_what_is_removed() -> None:
    """SparseGPT's weights have a smaller error on correlated inputs than their mask alone, and
    than the mask by magnitude.
    """
    draws, pattern = torch.Generator().manual_seed(0), Pattern(2, 4)
    mixing = torch.randn(256, 256, generator=draws) / 16 + torch.eye(256)
    x_TI = torch.randn(1024, 256, generator=draws) @ mixing
    weight_OI = torch.randn(16, 256, generator=draws)
    mask_OI, updated_OI = sparsegpt(weight_OI, 2 * x_TI.t() @ x_TI / 1024, pattern)
    errors = [
        float(((weight_OI - pruned_OI) @ x_TI.t()).square().sum())
        for pruned_OI in (
            updated_OI,
            weight_OI * mask_OI,
            weight_OI * best(weight_OI.abs(), pattern),
        )
    ]
    assert errors[0] < 0.8 * errors[1] and errors[0] < 0.8 * errors[2]
    assert bool((mask_OI.unflatten(1, (-1, 4)).sum(-1) == 2).all())
