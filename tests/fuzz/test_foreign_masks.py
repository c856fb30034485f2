"""Archives of other tools with mutated bytes, also with checksums that fit, are read or refused."""

from __future__ import annotations

import io
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from megamask.masks.foreign import maskllm_npz
from megamask.masks.foreign.kind import Base
from megamask.sparsity.pattern import Pattern
from megamask.weights.architecture import read_architecture
from megamask.weights.hf_files import open_checked
from megamask.weights.mapping import linear_shapes
from tests.fuzz.mutations import mutated_bytes, survives
from tests.unit.export.test_masked_folder import save_model


def test_maskllm_archives(tmp_path: Path) -> None:
    save_model(tmp_path / "hf")
    shapes = linear_shapes(read_architecture(tmp_path / "hf"))
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
            path.write_bytes(mutated_bytes(whole, choose))
            return
        part = 128 if choose.random() < 0.7 else len(array)  # the header, or anywhere
        with zipfile.ZipFile(path, "w") as archive:
            changed = mutated_bytes(array[:part], choose) + array[part:]
            archive.writestr(f"{names[0]}.weight.mask.npy", changed)

    with open_checked(tmp_path / "hf") as weights:
        base = Base(shapes, weights, Pattern(2, 4))
        survives(lambda: list(maskllm_npz.read(path, base)), write, count=800)
