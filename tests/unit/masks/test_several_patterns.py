"""Format version 4: each mask of a file has its own pattern, and a header that says another pattern
is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megamask import load_masks, save_masks
from megamask.errors import ArgumentError, ArtifactError
from megamask.masks.compare import chance, differences
from megamask.masks.verify import summary
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.pattern_plan import PatternPlan
from tests.unit.masks.test_file import rewrite

PINNED = Path(__file__).with_name("mixed-v4.safetensors")
NAMES = [f"model.layers.{number}.mlp.down_proj" for number in range(3)]
PATTERNS = dict(zip(NAMES, map(Pattern.parse, ("2:4", "6:8", "4:8:pair")), strict=True))


def pinned_masks() -> dict[str, torch.Tensor]:
    """Masks from integers alone, so that no generator of random numbers matters."""
    score = (torch.arange(6 * 16, dtype=torch.int64) * 48271 % 65521).view(6, 16)
    return {name: pattern.best(score) for name, pattern in PATTERNS.items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_masks(tmp_path / "m.safetensors", pinned_masks(), PATTERNS, fingerprint="f", method="m")
    return tmp_path / "m.safetensors"


def test_the_format_is_that_of_the_pinned_file(path: Path) -> None:
    masks = load_masks(PINNED)
    assert masks.meta["format_version"] == 4 and dict(masks.patterns) == PATTERNS
    assert all(torch.equal(masks[name], mask) for name, mask in pinned_masks().items())
    again = load_masks(path)
    assert again.content_sha256 == masks.content_sha256
    assert all((again._words(name) == masks._words(name)).all() for name in NAMES)


@pytest.mark.parametrize("coding", ["words", "uniform"])
def test_every_coding_is_exact(tmp_path: Path, coding: str) -> None:
    out, facts = tmp_path / "m.safetensors", {"fingerprint": "f", "method": "m"}
    patterns = {name: str(pattern) for name, pattern in PATTERNS.items()}
    save_masks(out, pinned_masks(), patterns, **facts, coding=coding)
    masks = load_masks(out)
    assert all(torch.equal(masks[name], mask) for name, mask in pinned_masks().items())
    assert masks.content_sha256 == load_masks(PINNED).content_sha256
    # one pattern, however it is said, is a file as before
    own = {name: P24.best(mask.float()) for name, mask in pinned_masks().items()}
    for number, pattern in enumerate((P24, dict.fromkeys(own, "2:4"))):
        save_masks(tmp_path / f"{number}.safetensors", own, pattern, **facts, coding=coding)
    files = [(tmp_path / f"{number}.safetensors").read_bytes() for number in range(2)]
    assert files[0] == files[1]
    assert load_masks(tmp_path / "0.safetensors").meta["format_version"] < 4


P24 = Pattern(2, 4)
FORGED: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda meta: meta.update(pattern="2:4"), "its masks are 2:4, 6:8 and 4:8:pair"),
    (lambda meta: meta["tensors"][NAMES[1]].update(pattern="4:8"), "its masks are"),
    (lambda meta: meta["tensors"][NAMES[1]].pop("pattern"), "has no pattern for"),
    (lambda meta: meta["tensors"][NAMES[1]].update(pattern=4), "pattern"),
    (lambda meta: meta["tensors"][NAMES[1]].update(coding="uniform"), "has no mask_sha256"),
    (lambda meta: meta["tensors"][NAMES[1]].update(mask_sha256="0"), "has no coding"),
    (lambda meta: meta.update(format_version=1), "in a header of one pattern"),
    (lambda meta: meta.update(format_version=3), "has no coding"),
]


@pytest.mark.parametrize(("forge", "said"), FORGED)
def test_headers_that_do_not_fit_are_refused(
    path: Path, forge: Callable[[dict[str, Any]], object], said: str
) -> None:
    rewrite(path, forge)
    with pytest.raises(ArtifactError, match=said):
        load_masks(path)


def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    facts = {"fingerprint": "f", "method": "m"}
    for patterns, said in (
        ({NAMES[0]: "2:4"}, "a pattern for each mask"),
        (dict.fromkeys(NAMES, "2:4"), "keeps exactly"),
        (dict.fromkeys(NAMES, "4:2"), "0 < N < M"),
    ):
        with pytest.raises(ArgumentError, match=said):
            save_masks(tmp_path / "m.safetensors", pinned_masks(), patterns, **facts)
    assert not [*tmp_path.iterdir()]


def test_what_is_told_of_several_patterns(path: Path, tmp_path: Path) -> None:
    masks = load_masks(path)
    shapes = {**{name: (6, 16) for name in NAMES}, "dense": (6, 32)}
    assert masks.density_of(shapes) == (0.5 + 0.75 + 0.5 + 2) / 5
    told = summary(masks)
    assert "2:4, 6:8 and 4:8:pair" in told and "0.5833" in told and "1 linears, 33.3%" in told
    with pytest.raises(ArtifactError, match="several patterns"):
        _ = masks.pattern
    wanted = PatternPlan({**PATTERNS, NAMES[1]: P24})
    with pytest.raises(ArtifactError, match=f"a 6:8 mask of {NAMES[1]}, wanted 2:4"):
        masks.check(plan=wanted)
    masks.check(plan=PatternPlan({NAMES[0]: P24, "another": Pattern(6, 8)}))

    # Groups are compared where the patterns agree.
    other = {name: wanted[name].best(torch.arange(96.0).view(6, 16)) for name in NAMES}
    save_masks(tmp_path / "b.safetensors", other, wanted, fingerprint="f", method="m")
    found = differences(masks, load_masks(tmp_path / "b.safetensors"))
    assert [found[name].groups for name in NAMES] == [24, 0, 12]
    said = chance(masks, load_masks(tmp_path / "b.safetensors"))
    assert said["kept_by_both"] == pytest.approx((0.25 + 0.375 + 0.25) / 3, rel=1e-12)
    # 24 groups of 2:4 and 12 of 4:8:pair, six candidates each
    assert said["groups_differ"] == pytest.approx(5 / 6, rel=1e-12)
