"""Archives of other tools with mutated bytes, also with checksums that fit, are read or refused."""

from __future__ import annotations

import io
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megamask.masks.foreign import layer_files, maskllm_npz, maskllm_pt, patch_npz
from megamask.masks.foreign.kind import Base, Kind
from megamask.sparsity.pattern import Pattern
from megamask.weights.architecture import read_architecture
from megamask.weights.hf_files import open_checked
from megamask.weights.mapping import linear_shapes
from tests.fuzz.mutations import mutated_bytes, put, survives
from tests.unit.export.test_masked_folder import save_model


def test_maskllm_archives(tmp_path: Path) -> None:
    save_model(tmp_path / "hf")
    arch = read_architecture(tmp_path / "hf")
    shapes = linear_shapes(arch)
    names = list(shapes)[:2]
    packed: dict[str, Any] = {
        f"{name}.weight.mask": np.full(np.prod(shapes[name]) // 8, 0x55, "u1") for name in names
    }
    path = tmp_path / "mask_compressed.npz"
    np.savez_compressed(path, **packed)
    whole = path.read_bytes()
    stream = io.BytesIO()
    np.save(stream, packed[f"{names[0]}.weight.mask"])
    array = stream.getvalue()

    def write(choose: random.Random) -> None:
        if choose.random() < 0.5:
            put(path, mutated_bytes(whole, choose))
            return
        part = 128 if choose.random() < 0.7 else len(array)  # the header, or anywhere
        with zipfile.ZipFile(path, "w") as archive:
            changed = mutated_bytes(array[:part], choose) + array[part:]
            archive.writestr(f"{names[0]}.weight.mask.npy", changed)

    with open_checked(tmp_path / "hf") as weights:
        base = Base(arch, weights, dict.fromkeys(linear_shapes(arch), Pattern(2, 4)))
        survives(lambda: list(maskllm_npz.read(path, base)), write, count=800)


@pytest.mark.parametrize("count", [100, pytest.param(3000, marks=pytest.mark.nightly)])
def test_other_files(tmp_path: Path, count: int) -> None:
    """PATCH's archives, MaskLLM's .pt and the files of MaskPro, of mutated bytes."""
    save_model(tmp_path / "hf")
    arch = read_architecture(tmp_path / "hf")
    (name, (rows, columns)), *_ = linear_shapes(arch).items()
    mask = torch.tensor([True, False]).repeat(rows, columns // 2)
    arrays: dict[str, Any] = {
        "__meta__": np.array("{}"),
        f"{name}.weight": np.packbits(mask.numpy()),
        f"{name}.weight.__shape__": np.array([rows, columns]),
    }
    np.savez(tmp_path / "patch.npz", **arrays)
    torch.save({f"{name}.weight.mask": mask.float()}, tmp_path / "mask.pt")
    folder = tmp_path / "layers"
    folder.mkdir()
    torch.save(mask, folder / f"{name}.pt")
    with open_checked(tmp_path / "hf") as weights:
        base = Base(arch, weights, dict.fromkeys(linear_shapes(arch), Pattern(2, 4)))
        for kind, file in (
            (patch_npz.KIND, tmp_path / "patch.npz"),
            (maskllm_pt.KIND, tmp_path / "mask.pt"),
            (layer_files.MASKPRO, folder / f"{name}.pt"),
        ):
            place = folder if file.parent == folder else file
            whole = file.read_bytes()

            def write(choose: random.Random, file: Path = file, whole: bytes = whole) -> None:
                file.unlink()  # an array of the file before may still be mapped
                put(file, mutated_bytes(whole, choose))

            def read(kind: Kind = kind, place: Path = place) -> None:
                assert kind.fits(place) in (True, False)
                for _, found in kind.read(place, base):
                    assert found.shape == (rows, columns) and found.dtype == torch.bool

            survives(read, write, count=count)
