"""How two masks differ, counted in plain Python beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megamask.errors import ArtifactError
from megamask.masks.compare import Difference, differences, unrelated
from megamask.masks.file import MaskSet, load_masks, save_masks
from megamask.sparsity.pattern import Pattern

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
SHAPES = {UP: (6, 16), DOWN: (3, 32)}
P24 = Pattern(2, 4)


def random_masks(pattern: Pattern, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: pattern.best(torch.rand(shape, generator=generator)) for name, shape in SHAPES.items()
    }


def saved(
    path: Path,
    masks: dict[str, torch.Tensor],
    pattern: Pattern = P24,
    fingerprint: str = "f",
    **facts: Any,
) -> MaskSet:
    save_masks(path, masks, pattern, fingerprint=fingerprint, method="m", **facts)
    return load_masks(path)


def counted(ours: torch.Tensor, theirs: torch.Tensor, m: int) -> dict[str, int]:
    """The counts, weight by weight and group by group."""
    pairs = [
        list(zip(one, other, strict=True))
        for one, other in zip(ours.tolist(), theirs.tolist(), strict=True)
    ]
    groups = [row[start : start + m] for row in pairs for start in range(0, len(row), m)]
    return {
        "weights": sum(len(row) for row in pairs),
        "weights_differ": sum(one != other for row in pairs for one, other in row),
        "kept_by_both": sum(one and other for row in pairs for one, other in row),
        "groups": len(groups),
        "groups_differ": sum(any(one != other for one, other in group) for group in groups),
    }


@pytest.mark.parametrize("pattern", [P24, Pattern(1, 4), Pattern(4, 8), Pattern(8, 16)], ids=str)
def test_counts_equal_those_of_a_loop(tmp_path: Path, pattern: Pattern) -> None:
    ours, theirs = random_masks(pattern, 0), random_masks(pattern, 1)
    theirs[DOWN] = ours[DOWN].clone()
    found = differences(
        saved(tmp_path / "a.safetensors", ours, pattern),
        saved(tmp_path / "b.safetensors", theirs, pattern),
    )
    assert found == {
        name: Difference(**counted(ours[name], theirs[name], pattern.m)) for name in SHAPES
    }
    assert (
        found[UP].groups_differ > 0 and found[DOWN].weights_differ == found[DOWN].groups_differ == 0
    )
    total = found[UP] + found[DOWN]
    assert (total.groups, total.groups_differ) == (192 // pattern.m, found[UP].groups_differ)
    assert total.shares()["kept_by_both"] == (found[UP].kept_by_both + 96 * pattern.density) / 192


def test_other_patterns_are_compared_by_weights_alone(tmp_path: Path) -> None:
    ours, theirs = random_masks(P24, 0), random_masks(Pattern(4, 8), 1)
    found = differences(
        saved(tmp_path / "a.safetensors", ours),
        saved(tmp_path / "b.safetensors", theirs, Pattern(4, 8)),
    )
    assert found == {
        name: Difference(
            **{**counted(ours[name], theirs[name], 4), "groups": 0, "groups_differ": 0}
        )
        for name in SHAPES
    }
    assert found[UP].shares()["groups_differ"] is None
    assert unrelated(P24, Pattern(4, 8))["groups_differ"] is None


@pytest.mark.parametrize(
    ("a", "b"), [(P24, P24), (P24, Pattern(1, 4)), (Pattern(1, 4), Pattern(4, 8))], ids=str
)
def test_unrelated_masks_show_the_shares_that_are_said(a: Pattern, b: Pattern) -> None:
    """Mean over all pairs of candidates, of the weights where both patterns repeat; 1e-12 leaves
    room for the order of fp64 sums.
    """
    m = max(a.m, b.m)
    ours, theirs = (
        [list(c) * (m // p.m) for c in p.candidates(torch.int64).tolist()] for p in (a, b)
    )
    pairs = [(one, other) for one in ours for other in theirs]
    differ = sum(x != y for one, other in pairs for x, y in zip(one, other, strict=True)) / (
        m * len(pairs)
    )
    both = sum(x and y for one, other in pairs for x, y in zip(one, other, strict=True)) / (
        m * len(pairs)
    )
    said = unrelated(a, b)
    assert said["weights_differ"] == pytest.approx(differ, rel=1e-12) and said[
        "kept_by_both"
    ] == pytest.approx(both, rel=1e-12)
    if a == b:
        assert said["groups_differ"] == pytest.approx(
            sum(one != other for one, other in pairs) / len(pairs), rel=1e-12
        )


def test_linears_of_one_mask_alone_are_left_out(tmp_path: Path) -> None:
    masks = random_masks(P24, 0)
    whole, part = (
        saved(tmp_path / "a.safetensors", masks),
        saved(tmp_path / "b.safetensors", {UP: masks[UP]}),
    )
    assert list(differences(whole, part)) == list(differences(part, whole)) == [UP]


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    masks = random_masks(P24, 0)
    a = saved(tmp_path / "a.safetensors", masks)
    narrow = {name: mask[:2] for name, mask in masks.items()}
    for other, said in [
        (
            saved(tmp_path / "b.safetensors", masks, fingerprint="0"),
            "another base model than .*a.safetensors. Compare masks of one model",
        ),
        (
            saved(tmp_path / "c.safetensors", {"model.other": masks[UP]}),
            "no linear in common with .*a.safetensors",
        ),
        (
            saved(tmp_path / "d.safetensors", narrow),
            r"up_proj has shape \(2, 16\), the model's linear \(6, 16\)",
        ),
    ]:
        with pytest.raises(ArtifactError, match=said):
            differences(a, other)


def test_masks_of_a_model_and_of_its_fp16_copy_are_compared(tmp_path: Path) -> None:
    """Either is a mask of both."""
    masks = random_masks(P24, 0)
    a = saved(tmp_path / "a.safetensors", masks, fingerprint="model", float16_fingerprints=["copy"])
    b = saved(tmp_path / "b.safetensors", masks, fingerprint="copy")
    assert list(differences(a, b)) == list(differences(b, a)) == [*masks]
