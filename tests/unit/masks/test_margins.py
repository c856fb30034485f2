"""Margins beside a mask file: 4 bits a weight, bound to their masks by a digest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megamask.config.paths import margins_path
from megamask.errors import ArtifactError
from megamask.masks.file import MaskSet, load_masks, save_masks
from megamask.masks.margins import load_margins, save_margins
from megamask.sparsity.margins import LEVELS, margins_of
from megamask.sparsity.pattern import Pattern

PATTERN = Pattern(2, 4)
SHAPES = {"model.layers.0.a": (6, 20), "model.layers.0.b": (5, 12)}  # 120 and 60: not whole words


def levels_of(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(LEVELS, shape, generator=generator).byte()
        for name, shape in SHAPES.items()
    }


def masks_of(path: Path, seed: int) -> MaskSet:
    generator = torch.Generator().manual_seed(seed)
    masks = {
        name: PATTERN.best(torch.rand(shape, generator=generator)) for name, shape in SHAPES.items()
    }
    save_masks(path, masks, PATTERN, fingerprint="f", method="wanda")
    return load_masks(path)


@pytest.fixture
def masks(tmp_path: Path) -> MaskSet:
    return masks_of(tmp_path / "wanda.safetensors", 0)


def save(masks: MaskSet, seed: int = 0) -> Path:
    path = margins_path(masks.path)
    save_margins(path, masks.content_sha256, SHAPES, reversed(list(levels_of(seed).items())))
    return path


def test_they_come_back(masks: MaskSet) -> None:
    path = save(masks)
    assert path.name == "wanda.margins" and path.stat().st_size < 1200  # 90 bytes of margins
    found = masks.margins()
    assert list(found) == list(SHAPES) and len(found) == 2
    for name, levels_OI in levels_of(0).items():
        assert torch.equal(found[name], margins_of(levels_OI))
        assert found[name].shape == SHAPES[name]


def test_other_margins_have_another_digest(masks: MaskSet) -> None:
    save(masks)
    first = masks.margins().content_sha256
    save(masks, seed=1)
    assert masks.margins().content_sha256 != first
    save(masks)
    assert masks.margins().content_sha256 == first != masks.content_sha256


def test_a_mask_file_without_margins_says_what_to_do(masks: MaskSet) -> None:
    with pytest.raises(ArtifactError, match=r"wanda\.margins: is missing.*prior\.margins=false"):
        masks.margins()


def test_margins_of_other_masks_are_refused(masks: MaskSet) -> None:
    save(masks)
    other = masks_of(masks.path, 1)
    with pytest.raises(ArtifactError, match="belongs to other masks"):
        other.margins()


def test_damage_is_told(masks: MaskSet) -> None:
    path = save(masks)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"margins of model\.layers\.0\.b are corrupt"):
        load_margins(masks.path, masks.content_sha256).check_whole()
    path.write_bytes(data[:-8])
    with pytest.raises(ArtifactError, match="wanda.margins"):
        masks.margins()
    path.write_bytes(masks.path.read_bytes())
    with pytest.raises(ArtifactError, match="has a header that has no kind"):
        masks.margins()
    path.unlink()
    path.mkdir()
    with pytest.raises(ArtifactError, match="wanda.margins"):
        load_margins(masks.path, masks.content_sha256)


def test_a_file_of_margins_is_no_mask_file(masks: MaskSet) -> None:
    with pytest.raises(ArtifactError):
        load_masks(save(masks))
