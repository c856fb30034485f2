"""Masks of other tools, written here by numpy and by transformers, become the same masks."""

from __future__ import annotations

import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megamask.errors import ArtifactError
from megamask.masks.file import load_masks, save_masks
from megamask.masks.foreign.importing import import_masks
from megamask.masks.verify import verify
from megamask.sparsity.pattern import Pattern
from megamask.weights.base_model import BaseModel
from megamask.weights.fingerprint import model_linears
from tests.unit.export.test_masked_folder import save_model

P24 = Pattern(2, 4)
Masks = dict[str, Tensor]
Given = tuple[Path, Masks]
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """A base model and masks of all its linears."""
    hf = tmp_path_factory.mktemp("base") / "hf"
    linears = model_linears(save_model(hf))
    generator = torch.Generator().manual_seed(1)
    return hf, {
        name: P24.best(torch.rand(one.weight.shape, generator=generator))
        for name, one in linears.items()
    }


def write_npz(path: Path, masks: Masks, **other: Any) -> Path:
    arrays = {f"{name}.weight.mask": np.packbits(mask.numpy()) for name, mask in masks.items()}
    np.savez_compressed(path, **{**arrays, **other})
    return path


def write_pruned(folder: Path, hf: Path, change: Callable[[Weights], None]) -> Path:
    shutil.copytree(hf, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def pruning(masks: Masks) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        for name, mask in masks.items():
            weights[f"{name}.weight"] *= mask

    return change


def content(folder: Path, hf: Path, masks: Masks) -> str:
    """The content digest of our own mask file."""
    path = folder / "own.safetensors"
    save_masks(path, masks, P24, fingerprint=BaseModel(hf).fingerprints().exact, method="learned")
    return load_masks(path).content_sha256


@pytest.mark.parametrize("kind", ["npz", "pruned", "pruned float16"])
def test_masks_come_back(given: Given, tmp_path: Path, kind: str) -> None:
    hf, masks = given
    if kind == "npz":
        source = write_npz(tmp_path / "mask_compressed.npz", masks)
    else:

        def change(weights: Weights) -> None:
            pruning(masks)(weights)
            if kind == "pruned float16":
                weights.update({name: tensor.half() for name, tensor in weights.items()})

        source = write_pruned(tmp_path / "pruned", hf, change)
    out = tmp_path / "mask.safetensors"
    import_masks(source, out, BaseModel(hf), P24)
    found = verify(out, hf)
    assert found.content_sha256 == content(tmp_path, hf, masks)
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())
    assert found.method == ("maskllm" if kind == "npz" else "pruned")


def test_linears_without_a_mask_are_named(
    given: Given, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hf, masks = given
    first = dict([next(iter(masks.items()))])
    for source in (
        write_npz(tmp_path / "m.npz", first),
        write_pruned(tmp_path / "pruned", hf, pruning(first)),
    ):
        caplog.clear()
        import_masks(source, tmp_path / "mask.safetensors", BaseModel(hf), P24)
        assert set(load_masks(tmp_path / "mask.safetensors")) == set(first)
        dense = f"{len(masks) - 1} linears have no mask and stay dense: {list(masks)[1]}, "
        assert dense in caplog.text


def test_zeros_of_the_base_model(given: Given, tmp_path: Path) -> None:
    """A kept zero is told where the base model has just enough zeros, and refused with more."""
    _, masks = given
    name = next(iter(masks))
    mask = masks[name].clone()
    mask[0, :8] = torch.tensor([1, 1, 0, 0, 1, 1, 0, 0]).bool()

    def base_of(zeros: list[int]) -> Path:
        def change(weights: Weights) -> None:
            weights[f"{name}.weight"][0, zeros] = 0

        return write_pruned(tmp_path / f"base{len(zeros)}", given[0], change)

    def imported(hf: Path) -> Tensor:
        source = write_pruned(tmp_path / f"{hf.name}-pruned", hf, pruning({name: mask}))
        import_masks(source, tmp_path / "mask.safetensors", BaseModel(hf), P24)
        return load_masks(tmp_path / "mask.safetensors")[name]

    assert torch.equal(imported(base_of([0, 6])), mask)  # one is kept, the other is pruned
    with pytest.raises(ArtifactError, match=rf"1 groups of {name} .* row 0, group 0"):
        imported(base_of([0, 2, 6]))


def zip_of(path: Path, member: str, data: bytes, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(member, data)
    return path


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def test_archives_that_do_not_fit_are_refused(given: Given, tmp_path: Path) -> None:
    hf, masks = given
    name, mask = next(iter(masks.items()))
    packed, path = np.packbits(mask.numpy()), tmp_path / "m.npz"
    member = f"{name}.weight.mask.npy"
    whole = npy(packed)
    bomb = whole[:128] + bytes(2**26)
    cases: dict[str, Callable[[], Path]] = {
        f"holds a mask of {name} that": lambda: zip_of(path, member, npy(packed[:-1])),
        "uint8": lambda: zip_of(path, member, npy(packed.astype(np.float32))),
        "object": lambda: zip_of(path, member, npy(np.array([{}] * len(packed), object))),
        f"not {len(packed)}": lambda: zip_of(path, member, bomb),
        "no such compression": lambda: zip_of(path, member, whole, zipfile.ZIP_LZMA),
        "no linear of the model": lambda: write_npz(path, {"model.layers.7.x": mask}),
        "not only arrays": lambda: write_npz(path, masks, extra=np.ones(1)),
        "2 of every 4 weights of": lambda: write_npz(path, {name: ~mask | mask}),
        "is not MaskLLM's": lambda: path if path.write_bytes(b"%PDF-") else path,
        "is missing": lambda: tmp_path / "none.npz",
        "is not masks of another tool": lambda: Path(shutil.copy(path, tmp_path / "m.pdf")),
    }
    for said, write in cases.items():
        with pytest.raises(ArtifactError, match=said):
            import_masks(write(), tmp_path / "mask.safetensors", BaseModel(hf), P24)
    assert not (tmp_path / "mask.safetensors").exists()


def test_folders_that_do_not_fit_are_refused(given: Given, tmp_path: Path) -> None:
    hf, masks = given
    name = next(iter(masks))

    def updated(weights: Weights) -> None:
        pruning(masks)(weights)
        weights[f"{name}.weight"][masks[name]] *= 2

    def other_norm(weights: Weights) -> None:
        pruning(masks)(weights)
        weights["model.norm.weight"] += 1

    def too_few(weights: Weights) -> None:
        weights[f"{name}.weight"][0, :4] = 0

    cases = {
        f"weights of {name} that are neither zero nor": updated,
        "another model.norm.weight than the base model": other_norm,
        f"does not keep 2 of every 4 weights of {name}": too_few,
        "prunes no linear": lambda weights: None,
    }
    for number, (said, change) in enumerate(cases.items()):
        source = write_pruned(tmp_path / str(number), hf, change)
        with pytest.raises(ArtifactError, match=said):
            import_masks(source, tmp_path / "mask.safetensors", BaseModel(hf), P24)
    save_model(tmp_path / "another", seed=5)
    source = write_pruned(tmp_path / "pruned", hf, pruning(masks))
    with pytest.raises(ArtifactError, match="neither zero nor the base model's"):
        import_masks(source, tmp_path / "mask.safetensors", BaseModel(tmp_path / "another"), P24)
    assert not (tmp_path / "mask.safetensors").exists()
