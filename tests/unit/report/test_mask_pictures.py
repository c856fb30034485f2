"""What the pictures of masks show: differences of any two, norms of kept weights, samples."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megamask.config import Config, build_config
from megamask.masks.file import MaskSet, load_masks, save_masks
from megamask.report.kept_norms import norms_picture, read_kept_norms
from megamask.report.mask_matrix import differing_shares, matrix_picture
from megamask.report.samples_pictures import read_samples, samples_picture
from megamask.sparsity.pattern import Pattern
from megamask.weights.fingerprint import fingerprint_model, model_linears
from tests.unit.masks.test_apply import tiny_model

P24 = Pattern(2, 4)


def saved(
    file: Path, masks: dict[str, Tensor], pattern: Pattern = P24, model: str = "m", **facts: Any
) -> MaskSet:
    save_masks(file, masks, pattern, fingerprint=model, method=file.stem, **facts)
    return load_masks(file)


def drawn(seed: int, pattern: Pattern = P24) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pattern.best(torch.rand(6, 16, generator=generator))


def test_shares_are_those_of_the_groups_of_common_linears(tmp_path: Path) -> None:
    a = {"layers.0.up": drawn(0), "layers.1.up": drawn(1)}
    b = {"layers.0.up": drawn(2), "layers.1.down": drawn(3)}
    sets = [
        saved(tmp_path / "a.safetensors", a),
        saved(tmp_path / "b.safetensors", b),
        saved(tmp_path / "c.safetensors", {"layers.0.up": drawn(4, Pattern(1, 4))}, Pattern(1, 4)),
        saved(tmp_path / "d.safetensors", a, model="another"),
        saved(tmp_path / "e.safetensors", a),
    ]
    shares = differing_shares(sets)
    groups = (a["layers.0.up"] != b["layers.0.up"]).view(6, 4, 4).any(-1)
    assert shares[0][1] == shares[1][0] == float(groups.double().mean()) > 0
    assert shares[0][4] == 0.0 and [shares[i][i] for i in range(5)] == [0.0] * 5
    assert all(math.isnan(shares[0][other]) for other in (2, 3))
    texts = [one.get_text() for one in matrix_picture(list("abcde"), shares).axes[0].texts]
    assert texts.count(f"{shares[0][1]:.1%}") == 4  # a and e against b, both ways
    assert len(texts) == 5 + 2 * 3  # the diagonal, and a-b, a-e, b-e both ways


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("norms") / "hf"
    tiny_model(num_hidden_layers=2).save_pretrained(folder)
    return folder


def settings(hf: Path, run_dir: Path) -> Config:
    return build_config({"run_dir": str(run_dir), "model": {"hf": str(hf)}})


def test_norms_are_relative_to_the_largest_of_the_pattern(hf: Path, tmp_path: Path) -> None:
    model = tiny_model(num_hidden_layers=2)
    weights = {name: one.weight.detach() for name, one in model_linears(model).items()}
    own = fingerprint_model(model)
    # Wrong masks: the weights of least magnitude. The first layer has no such mask.
    worst = {name: P24.best(-one.abs()) for name, one in weights.items() if ".1." in name}
    largest = {name: P24.best(one.abs()) for name, one in weights.items()}
    masks = {
        "magnitude": saved(tmp_path / "magnitude.safetensors", largest, model=own),
        "worst": saved(tmp_path / "worst.safetensors", worst, model=own),
        "stranger": saved(tmp_path / "stranger.safetensors", largest),
        "updated": saved(tmp_path / "u.safetensors", largest, model=own, updated_weights=True),
    }
    norms = read_kept_norms(settings(hf, tmp_path), masks)
    assert norms is not None and set(norms.by_method) == {"magnitude", "worst"}
    assert norms.by_method["magnitude"] == [1.0, 1.0]
    expected = [
        sum(float(weights[name][masks[name]].abs().sum()) for name in worst)
        for masks in (worst, largest)
    ]
    none, share = norms.by_method["worst"]
    # fp32 sums of some thousand weights against fp64 sums.
    assert math.isnan(none) and share == pytest.approx(expected[0] / expected[1], rel=1e-5)
    assert share < 0.8
    (axes,) = norms_picture(norms).axes
    assert "magnitude 100.0%" in [one.get_text() for one in axes.texts]


def test_norms_need_a_model_that_can_be_read(hf: Path, tmp_path: Path) -> None:
    masks = {"a": saved(tmp_path / "a.safetensors", {"layers.0.up": drawn(0)})}
    assert read_kept_norms(settings(tmp_path / "absent", tmp_path), masks) is None
    assert read_kept_norms(settings(hf, tmp_path), masks) is None  # masks of another model
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/config.json").write_text("{")
    assert read_kept_norms(settings(tmp_path / "torn", tmp_path), masks) is None


def test_learning_begins_with_the_samples_of_its_prior(tmp_path: Path) -> None:
    one = {"layers.0.up": drawn(0)}
    prior = saved(tmp_path / "wanda.safetensors", one, data={"calibration": {"samples": 8}})
    learned = saved(tmp_path / "learned.safetensors", one, data={"seq_length": 16})
    samples = read_samples({"wanda": prior, "learned": learned}, prior)
    assert samples is not None and (samples.before, samples.length) == (8, 16)
    assert samples.calibration == {"wanda": 8}
    records = [{"tokens": tokens, "perplexity": {"code": 9.0 - tokens / 64}} for tokens in (0, 64)]
    (axes,) = samples_picture(records, {"perplexity": {"wanda": {"code": 9.5}}}, samples).axes
    curve, point = axes.lines
    assert np.asarray(curve.get_xdata()).tolist() == [8, 12]
    assert np.asarray(point.get_xdata()).tolist() == [8]
    assert read_samples({"wanda": prior}, prior) is None
    strange = saved(tmp_path / "strange.safetensors", one, data={"seq_length": "16"})
    assert read_samples({"learned": strange}, None) is None
