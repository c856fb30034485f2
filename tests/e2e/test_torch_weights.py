"""Folders with pytorch_model.bin alone: converted to the same bits as safetensors, and a hostile
pickle runs nothing.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.program import in_process, refusal


class Payload:
    """Unpickled, it makes the folder that it was given."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def without_weights(model: Path, folder: Path) -> dict[str, torch.Tensor]:
    """A copy of a model's folder without its weights, which are returned."""
    ignored = shutil.ignore_patterns("*.safetensors*")
    shutil.copytree(model, folder, ignore=ignored)
    return load_file(model / "model.safetensors")


def in_parts(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Two files and an index, as old repositories of large models have them."""
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def in_a_view(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Tensors that are transposed views of others, and shared storage."""
    stored = {
        name: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor
        for name, tensor in tensors.items()
    }
    torch.save(stored, folder / "pytorch_model.bin")


def as_parameters(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    state = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    torch.save(state, folder / "pytorch_model.bin")


def old_format(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The format before PyTorch 1.6."""
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


@pytest.fixture(scope="module")
def converted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the weights of the safetensors."""
    run_dir = tmp_path_factory.mktemp("safetensors")
    assert in_process("convert", f"run_dir={run_dir}", f"model.hf={model}").code == 0
    return run_dir


@pytest.mark.parametrize("write", [in_parts, in_a_view, as_parameters, old_format])
def test_the_same_bits_as_safetensors(
    write: Callable[[Path, dict[str, torch.Tensor]], None],
    model: Path,
    converted: Path,
    tmp_path: Path,
) -> None:
    tensors = without_weights(model, tmp_path / "hf")
    write(tmp_path / "hf", tensors)
    words = [f"run_dir={tmp_path / 'run'}", f"model.hf={tmp_path / 'hf'}"]
    assert in_process("convert", *words).code == 0
    weights = tmp_path / "run" / "weights"
    files = sorted(file.name for file in weights.glob("*.distcp"))
    assert files
    for file in files:
        assert (weights / file).read_bytes() == (converted / "weights" / file).read_bytes()
    note = json.loads((weights / "megamask.json").read_text())
    known = json.loads((converted / "weights" / "megamask.json").read_text())
    assert note["fingerprint"] == known["fingerprint"]
    # Another weight gives other bytes: the comparison can fail.
    name = next(iter(tensors))
    tensors[name].view(-1)[0] += 1
    write(tmp_path / "hf", tensors)
    assert in_process("convert", *words, f"run_dir={tmp_path / 'other'}").code == 0
    assert any(
        (tmp_path / "other" / "weights" / file).read_bytes() != (weights / file).read_bytes()
        for file in files
    )


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("place", ["pytorch_model.bin", "pytorch_model-00002-of-00002.bin"])
def test_a_payload_never_runs(model: Path, tmp_path: Path, place: str, old: bool) -> None:
    target = tmp_path / "made-by-the-payload"
    tensors: dict[str, Any] = without_weights(model, tmp_path / "hf")
    if place != "pytorch_model.bin":
        in_parts(tmp_path / "hf", tensors)
    tensors["model.norm.weight"] = Payload(target)
    torch.save(tensors, tmp_path / "hf" / place, _use_new_zipfile_serialization=not old)
    done = in_process("convert", f"run_dir={tmp_path / 'run'}", f"model.hf={tmp_path / 'hf'}")
    said = refusal(done)
    assert place in said and "more than tensors" in said and "mkdir" in said
    assert not target.exists()
    with pytest.raises(OSError):  # the payload works: its folder would be made, were it allowed
        (tmp_path / "made-by-the-payload").mkdir()
        pickle.loads(pickle.dumps(Payload(target)))


def of_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": 1}))


def of_list(path: Path) -> None:
    torch.save([torch.ones(2)], path)


def of_nested(path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}}, path)


def of_sparse(path: Path) -> None:
    torch.save({"a": torch.eye(3).to_sparse()}, path)


def of_half(path: Path) -> None:
    torch.save({"a": torch.ones(1000)}, path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def of_page(path: Path) -> None:
    path.write_text("<html>log in</html>")


def of_nothing(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "write", [of_pickle, of_list, of_nested, of_sparse, of_half, of_page, of_nothing]
)
def test_other_files_are_named(write: Callable[[Path], None], model: Path, tmp_path: Path) -> None:
    without_weights(model, tmp_path / "hf")
    write(tmp_path / "hf" / "pytorch_model.bin")
    done = in_process("convert", f"run_dir={tmp_path / 'run'}", f"model.hf={tmp_path / 'hf'}")
    assert "pytorch_model.bin" in refusal(done)
