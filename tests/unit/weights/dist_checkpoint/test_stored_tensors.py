"""Blocks of stored tensors are those of the tensors, whatever the pieces, and torn pieces show."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megamask.errors import ArtifactError
from megamask.safe_checkpoint import INDEX, read_index
from megamask.weights.dist_checkpoint import stored_tensors
from megamask.weights.dist_checkpoint.checkpoint_writer import CheckpointWriter, write_index
from megamask.weights.dist_checkpoint.stored_tensors import StoredTensors
from tests.fuzz.mutations import bytes_writer, survives


def whole_of(stored: StoredTensors, key: str) -> torch.Tensor:
    return stored.read(key, [range(size) for size in stored.shapes()[key]])


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """Plain tensors, and tensors whose numbers PyTorch does not store in their order."""
    torch.manual_seed(0)
    return {
        "fp32": torch.randn(7, 5),
        "bf16": torch.randn(3, 4, 6).bfloat16(),
        "row": torch.randn(9).half(),
        "number": torch.tensor(3.5),
        "turned": torch.randn(5, 8).t(),
        "part": torch.randn(6, 8)[2:4, ::2],
    }


def test_any_block(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    generator = random.Random(0)
    with StoredTensors(tmp_path, "") as stored:
        assert stored.shapes() == {key: tuple(one.shape) for key, one in tensors.items()}
        for key, tensor in tensors.items():
            assert stored.dtype(key) == tensor.dtype
            assert torch.equal(whole_of(stored, key), tensor), key
            for _ in range(10):
                ends = [sorted(generator.choices(range(s + 1), k=2)) for s in tensor.shape]
                found = stored.read(key, [range(*pair) for pair in ends])
                assert torch.equal(found, tensor[tuple(slice(*pair) for pair in ends)]), (key, ends)


def test_pieces_of_every_cut(tmp_path: Path) -> None:
    """Pieces of rows, of columns and of layers in several files make the tensor again."""
    whole = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
    with CheckpointWriter(tmp_path, file_bytes=1000) as writer:
        for layer in range(3):
            for row in range(0, 6, (layer + 1)):
                for column in (0, 4):
                    piece = whole[layer : layer + 1, row : row + layer + 1, column : column + 4]
                    writer.add("x", (layer, row, column), (3, 6, 8), piece)
    write_index(tmp_path, writer.written, {})
    assert len(list(tmp_path.glob("*.distcp"))) > 2
    with StoredTensors(tmp_path, "") as stored:
        assert torch.equal(whole_of(stored, "x"), whole)
        found = stored.read("x", [range(1, 3), range(1, 4), range(3, 7)])
        assert torch.equal(found, whole[1:3, 1:4, 3:7])


def test_a_tensor_that_lacks_a_piece(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path) as writer:
        writer.add("x", (0, 0), (4, 2), torch.ones(2, 2))
    write_index(tmp_path, writer.written, {})
    with StoredTensors(tmp_path, "Fix.") as stored:
        assert torch.equal(stored.read("x", [range(2), range(2)]), torch.ones(2, 2))
        with pytest.raises(ArtifactError, match=r"x is not stored as a whole\)\. Fix\."):
            whole_of(stored, "x")


def one_byte(path: Path, data: bytes) -> Callable[[random.Random], None]:
    """Writes another byte somewhere: of a pickle, more changes leave nothing to read."""

    def write(choose: random.Random) -> None:
        changed = bytearray(data)
        changed[choose.randrange(len(data))] = choose.randrange(256)
        path.write_bytes(changed)

    return write


@pytest.mark.parametrize(("name", "change"), [(INDEX, one_byte), ("__0_0.distcp", bytes_writer)])
def test_no_byte_breaks_the_reader(
    name: str,
    change: Callable[[Path, bytes], Callable[[random.Random], None]],
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
) -> None:
    # PyTorch's own writer puts a random number into the index.
    with CheckpointWriter(tmp_path) as writer:
        for key, tensor in tensors.items():
            writer.add(key, (0,) * tensor.dim(), tuple(tensor.shape), tensor)
    write_index(tmp_path, writer.written, {})

    def read() -> None:
        with StoredTensors(tmp_path, "") as stored:
            for key in stored.shapes():
                whole_of(stored, key)

    path = tmp_path / name
    survives(read, change(path, path.read_bytes()), count=200)


def written(folder: Path, value: float) -> None:
    """Tensors ``a`` and ``b`` of one value, each in a file of its own."""
    folder.mkdir()
    with CheckpointWriter(folder, file_bytes=1) as writer:
        for key in ("a", "b"):
            writer.add(key, (0, 0), (2, 2), torch.full((2, 2), value))
    write_index(folder, writer.written, {})
    assert len(list(folder.glob("*.distcp"))) == 2


def test_no_tensor_comes_from_a_folder_that_took_the_name(tmp_path: Path) -> None:
    """A verb renames new weights to the name, and deletes the old ones, while another reads."""
    written(tmp_path / "one", 1.0)
    written(tmp_path / "two", 2.0)
    with StoredTensors(tmp_path / "one", "") as stored:
        assert whole_of(stored, "a").eq(1).all()
        (tmp_path / "one").rename(tmp_path / "old")
        (tmp_path / "two").rename(tmp_path / "one")
        assert whole_of(stored, "b").eq(1).all()
    with StoredTensors(tmp_path / "one", "") as stored:
        assert whole_of(stored, "a").eq(2).all()
        shutil.rmtree(tmp_path / "one")
        with pytest.raises(ArtifactError, match="was replaced by another process while it was"):
            whole_of(stored, "b")


def test_a_folder_that_is_replaced_while_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "one", 1.0)

    def late(folder: Path, *rest: object, **more: object) -> object:
        found = read_index(folder, *rest, **more)  # type: ignore[arg-type]
        (tmp_path / "one").rename(tmp_path / "old")
        written(tmp_path / "one", 2.0)
        return found

    monkeypatch.setattr(stored_tensors, "read_index", late)
    with pytest.raises(ArtifactError, match="was replaced"):
        StoredTensors(tmp_path / "one", "")
