"""Files that are written in blocks: the bytes of the libraries' own writers, whatever the tensors,
and errors of the thread that writes.
"""

from __future__ import annotations

import errno
import io
import math
import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megamask.weights import file_stream
from megamask.weights.dist_checkpoint.checkpoint_writer import CheckpointWriter
from megamask.weights.file_stream import FileStream, Streamed, row_blocks
from megamask.weights.safetensors_writer import NAMES, write_safetensors
from megamask.weights.source import BITS, all_finite

SHAPES = [(3, 5), (), (0, 4), (7,), (2, 3, 4)]


def of_every_dtype() -> dict[str, torch.Tensor]:
    """Tensors of every dtype and shape; names that are not ASCII too."""
    draws, found = torch.Generator().manual_seed(0), {}
    for number, dtype in enumerate(NAMES):
        for letter, shape in zip("xaéZ0", SHAPES, strict=True):
            count = math.prod(shape) * dtype.itemsize
            most = 2 if dtype == torch.bool else 100
            raw = torch.randint(0, most, (count,), dtype=torch.uint8, generator=draws)
            found[f"{letter}{number}"] = raw.view(dtype).view(shape)
    return found


@pytest.fixture(params=[64, 2**20])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of a buffer: a buffer holds a part of a row, or all tensors."""
    monkeypatch.setattr(file_stream, "BLOCK", request.param)
    size: int = request.param
    return size


def test_a_safetensors_file_has_the_bytes_of_the_library(tmp_path: Path, block: int) -> None:
    tensors = of_every_dtype()
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    write_safetensors(tmp_path / "ours", {name: Streamed.of(one) for name, one in tensors.items()})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    turned = {"x": torch.randn(5, 70).t()[:, 1:]}
    save_file({"x": turned["x"].contiguous()}, tmp_path / "theirs", metadata={"format": "pt"})
    write_safetensors(tmp_path / "ours", {"x": Streamed.of(turned["x"].t()).t()})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_piece_is_what_torch_saves(tmp_path: Path, block: int) -> None:
    """With the checksum of its numbers, which ``zipfile`` compares, and what nobody reads aside:
    PyTorch's mark of the archive is made of the checksums.
    """
    tensors = {"row": torch.randn(500).half(), "turned": torch.randn(30, 4).t()}
    tensors |= {"number": torch.tensor(2.5), "empty": torch.empty(0, 3)}
    with CheckpointWriter(tmp_path) as writer:
        for name, tensor in tensors.items():
            writer.add(name, (0,) * tensor.dim(), tuple(tensor.shape), tensor)
    data = (tmp_path / "__0_0.distcp").read_bytes()
    for piece in writer.written:
        ours, theirs = io.BytesIO(data[piece.start : piece.start + piece.length]), io.BytesIO()
        torch.save(tensors[piece.key].contiguous(), theirs)
        found, expected = zipfile.ZipFile(ours), zipfile.ZipFile(theirs)
        assert found.testzip() is None and found.namelist() == expected.namelist()
        for name in found.namelist():
            same = found.read(name) == expected.read(name)
            assert same or name.endswith("serialization_id"), (piece.key, name)
        ours.seek(0)
        assert torch.equal(torch.load(ours, weights_only=True), tensors[piece.key])


def test_blocks_are_converted(tmp_path: Path, block: int) -> None:
    whole, seen = torch.randn(40, 9), []
    with FileStream(tmp_path / "x") as file:
        for rows in row_blocks((40, 9), torch.bfloat16):
            file.put(whole[rows], torch.bfloat16, lambda part: seen.append(part.clone()))
    expected = whole.bfloat16().flatten()
    assert torch.equal(torch.cat(seen), expected)
    assert (tmp_path / "x").read_bytes() == expected.view(torch.uint8).numpy().tobytes()


def test_an_error_of_the_thread_is_raised(tmp_path: Path) -> None:
    tmp_path.joinpath("x").symlink_to("/dev/full")
    with (
        pytest.raises(OSError, match=os.strerror(errno.ENOSPC)),
        FileStream(tmp_path / "x") as file,
    ):
        for _ in range(10):
            file.put(torch.zeros(2**20, dtype=torch.uint8), torch.uint8)
    with pytest.raises(ValueError, match="mine"), FileStream(tmp_path / "y"):
        raise ValueError("mine")


@pytest.mark.parametrize("dtype", [*BITS])
def test_every_number_that_is_not_finite_shows(dtype: torch.dtype) -> None:
    """The largest finite numbers pass; infinities and NaN of either sign do not, wherever."""
    about = torch.finfo(dtype)
    whole = torch.tensor([about.max, about.min, about.tiny, -0.0, 0.0], dtype=dtype).repeat(9)
    assert all_finite(whole) and all_finite(whole[:0]) and all_finite(whole[::2])
    for wrong in (math.inf, -math.inf, math.nan, -math.nan):
        for place in (0, 20, 44):
            other = whole.clone()
            other[place] = wrong
            assert not all_finite(other) and bool(torch.isfinite(other).all()) is False
