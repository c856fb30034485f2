import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megamask.masks.file import load_masks, save_masks
from megamask.report.layers import read_layers
from megamask.report.plot_style import spread
from megamask.report.step_pictures import running_median
from megamask.sparsity.pattern import Pattern


def test_density_and_difference_by_layer_and_kind(tmp_path: Path) -> None:
    pattern = Pattern(2, 4)
    generator = torch.Generator().manual_seed(0)
    shapes = {"self_attn.q_proj": (8, 8), "mlp.down_proj": (8, 24)}
    prior = {
        f"model.layers.{layer}.{kind}": pattern.best(torch.rand(shape, generator=generator))
        for layer in range(3)
        for kind, shape in shapes.items()
    }
    learned = dict(prior)
    learned["model.layers.2.mlp.down_proj"] = pattern.best(torch.rand(8, 24, generator=generator))
    del learned["model.layers.1.self_attn.q_proj"]
    save_masks(tmp_path / "a.safetensors", learned, pattern, fingerprint="f", method="learned")
    save_masks(tmp_path / "b.safetensors", prior, pattern, fingerprint="f", method="sparsegpt")
    table = read_layers(*(load_masks(tmp_path / f"{name}.safetensors") for name in "ab"))

    rows = zip(
        learned["model.layers.2.mlp.down_proj"].tolist(),
        prior["model.layers.2.mlp.down_proj"].tolist(),
        strict=True,
    )
    differ = [row[i : i + 4] != other[i : i + 4] for row, other in rows for i in range(0, 24, 4)]
    assert table.kinds == ["q_proj", "down_proj"] and table.layers == 3
    assert table.density_L == [
        0.5,
        (64 + 96) / 256,
        0.5,
    ]  # in layer 1 the 64 weights of q_proj are all kept
    assert table.difference_KL is not None
    assert table.difference_KL[0][0] == table.difference_KL[0][2] == 0 and math.isnan(
        table.difference_KL[0][1]
    )
    # a float32 mean against a Python one
    assert (
        table.difference_KL[1] == [0, 0, pytest.approx(sum(differ) / len(differ), rel=1e-6)]
        and sum(differ) > 0
    )
    assert read_layers(load_masks(tmp_path / "a.safetensors"), None).difference_KL is None


def test_density_of_experts(tmp_path: Path) -> None:
    """A layer with a dense feed-forward part, one whose four experts are pruned, one of whose
    experts one is.
    """
    pattern = Pattern(2, 4)
    names = ["0.mlp", *(f"1.mlp.experts.{n}" for n in range(4)), "2.mlp.experts.3"]
    masks = {f"model.layers.{name}.down_proj": pattern.best(torch.rand(8, 8)) for name in names}
    save_masks(tmp_path / "a.safetensors", masks, pattern, fingerprint="f", method="learned")
    table = read_layers(load_masks(tmp_path / "a.safetensors"), None)
    assert table.density_L == [0.5, 0.5, 0.875]


def test_another_pattern_cannot_be_compared(tmp_path: Path) -> None:
    for name, pattern in (("a", Pattern(2, 4)), ("b", Pattern(4, 8))):
        masks = {"model.layers.0.mlp.up_proj": pattern.best(torch.arange(32.0).view(4, 8))}
        save_masks(tmp_path / f"{name}.safetensors", masks, pattern, fingerprint="f", method="m")
    table = read_layers(*(load_masks(tmp_path / f"{name}.safetensors") for name in "ab"))
    assert table.difference_KL is not None and math.isnan(table.difference_KL[0][0])


def test_running_median_ignores_outliers_and_gaps() -> None:
    values = np.array([1.0, 1.0, 100.0, np.nan, 1.0, 1.0, 3.0, 3.0, 3.0, 3.0])
    assert running_median(values).tolist() == [1, 1, 1, 1, 2, 2, 3, 3, 3, 3]


def test_labels_are_spread_and_stay_below_the_top() -> None:
    assert spread([0.0, 0.5, 0.52, 0.99, 1.0], 0.1) == pytest.approx([0.0, 0.5, 0.6, 0.9, 1.0])
