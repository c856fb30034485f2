"""Megatron weights on disk, saved and loaded by the functions that the verbs use."""

from __future__ import annotations

import errno
import importlib.util
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megamask.errors import ArtifactError, ConfigError
from megamask.model import checkpoint, spec
from megamask.model.build import build_model
from megamask.model.checkpoint import (
    load_sharded,
    load_weights,
    save_sharded,
    sharded_state,
)
from megamask.model.language_model import LanguageModel
from megamask.model.layer_parts import FrozenNorm
from megamask.model.spec import ENGINE, has_transformer_engine
from megamask.parallel.mesh import Mesh, start
from megamask.safe_checkpoint import COMMON, INDEX, NOTE
from megamask.weights.architecture import read_architecture
from tests.unit.learn.one_rank import ROOT, tiny_config

CONFIG = tiny_config()


class NormWithExtraState(FrozenNorm):
    """Stands in for Transformer Engine's norm, which has extra state beside its weight."""

    extra: Any = None

    def get_extra_state(self) -> torch.Tensor:
        """What Transformer Engine returns without FP8."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Keep what was loaded."""
        self.extra = state


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    with start(CONFIG) as mesh:
        yield mesh


def model_of(mesh: Mesh, seed: int) -> LanguageModel:
    arch = read_architecture(ROOT / "configs" / "models" / "tiny-llama.json")
    model = build_model(CONFIG, arch, mesh)
    noise = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(generator=noise)
    return model


@pytest.mark.parametrize("has_extra_state", [False, True])
def test_a_model_comes_back(
    has_extra_state: bool, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where modules have extra state, which is not saved; before, the load missed it."""
    if has_extra_state:
        monkeypatch.setattr(spec, "FrozenNorm", NormWithExtraState)
    saved, loaded = model_of(mesh, 1), model_of(mesh, 2)
    # Megatron's linears have extra state too, and put it back themselves.
    extra = [key for key in saved.state_dict() if key.endswith("norm._extra_state")]
    assert bool(extra) == has_extra_state
    path = tmp_path / "weights"
    save_sharded(sharded_state(saved), path, mesh, {})
    load_weights(loaded, path)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, saved.get_parameter(name)), name
    if has_extra_state:
        without = {key: one for key, one in saved.state_dict().items() if key not in extra}
        with pytest.raises(RuntimeError, match="_extra_state"):
            loaded.load_state_dict(without, strict=True)


def test_equal_models_have_equal_bytes(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's index alone would differ: it names the folder and a random number of the save."""

    def saved(name: str) -> dict[str, bytes]:
        save_sharded(sharded_state(model_of(mesh, 1)), tmp_path / name, mesh, {})
        return {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}

    whole = saved("one")
    assert saved("another") == whole and {INDEX, COMMON, NOTE} < whole.keys()
    monkeypatch.setattr(checkpoint, "settle_index", lambda _: None)
    other = saved("third")
    assert [name for name in whole if whole[name] != other[name]] == [INDEX]


def test_a_weight_that_is_missing_is_still_missed(mesh: Mesh, tmp_path: Path) -> None:
    model, path = model_of(mesh, 1), tmp_path / "weights"
    state = sharded_state(model)
    state.pop("decoder.final_layernorm.weight")
    save_sharded(state, path, mesh, {})
    with pytest.raises(Exception, match="decoder.final_layernorm.weight"):
        load_weights(model, path)


def garbage(file: Path) -> None:
    file.write_bytes(random.Random(0).randbytes(file.stat().st_size))


def zeros(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def flipped(file: Path) -> None:
    """The first bytes of the archives in the file are other bytes."""
    file.write_bytes(file.read_bytes().replace(b"PK\x03\x04", b"PK\x03\x05"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def test_pieces_that_cannot_be_read_are_one_message(mesh: Mesh, tmp_path: Path) -> None:
    model, whole = model_of(mesh, 1), tmp_path / "whole"
    save_sharded(sharded_state(model), whole, mesh, {})
    for damage in (garbage, zeros, flipped, cut, folder, pipe, Path.unlink):
        path = Path(shutil.copytree(whole, tmp_path / "weights"))
        for file in path.glob("*.distcp"):
            damage(file)
        with pytest.raises(
            ArtifactError, match="weights.*(cannot be read|torn|folder|FIFO)"
        ) as told:
            load_weights(model, path)
        assert "\n" not in str(told.value) and "weights_only" not in str(told.value), damage
        shutil.rmtree(path)


def test_pieces_of_another_user_are_one_message(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = model_of(mesh, 1), tmp_path / "weights"
    save_sharded(sharded_state(model), path, mesh, {})

    def no_permission(*_: Any, **__: Any) -> None:  # the tests may run as root
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path / "__0_0.distcp"))

    monkeypatch.setattr(torch.distributed.checkpoint.FileSystemReader, "read_data", no_permission)
    with pytest.raises(ArtifactError, match=r"weights: cannot be read \(Permission denied\). Ask"):
        load_weights(model, path)


def test_a_writer_that_fails_is_one_message(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron raises a CheckpointException, which is no Exception: the net of main misses it."""

    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("the writer fell over")

    monkeypatch.setattr(filesystem_async, "_write_item", broken)
    path = tmp_path / "weights"
    with pytest.raises(
        ArtifactError, match="weights: could not be written .*writer fell over"
    ) as told:
        save_sharded(sharded_state(model_of(mesh, 1)), path, mesh, {})
    assert not isinstance(told.value.__cause__, Exception) and list(tmp_path.iterdir()) == []


def test_transformer_engine_is_used_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    there, cuda = object(), torch.device("cuda", 0)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: there if name == "transformer_engine" else find(name, *rest),
    )
    monkeypatch.delenv(ENGINE, raising=False)
    assert not has_transformer_engine(cuda)  # importable is not enough
    monkeypatch.setenv(ENGINE, "1")
    assert has_transformer_engine(cuda) and not has_transformer_engine(torch.device("cpu"))
    there = None
    with pytest.raises(ConfigError, match=f"{ENGINE} = '1': .*not installed. Unset it"):
        has_transformer_engine(cuda)
    monkeypatch.setenv(ENGINE, "yes")
    with pytest.raises(ConfigError, match="0 or 1"):
        has_transformer_engine(cuda)


def test_integers_are_not_read_as_real_numbers(mesh: Mesh, tmp_path: Path) -> None:
    """PyTorch's reader would convert them in silence: codes would pass for the values they code."""

    def state(tensor: torch.Tensor) -> dict[str, Any]:
        return {"x": ShardedTensor.from_rank_offsets("x", tensor)}

    codes = torch.full((8,), 200, dtype=torch.uint8)
    for name, saved in {"codes": codes, "values": torch.rand(8)}.items():
        save_sharded(state(saved), tmp_path / name, mesh, {})
        loaded = load_sharded(state(torch.zeros_like(saved)), tmp_path / name, "")
        assert torch.equal(loaded["x"], saved)
        other = torch.zeros(8, dtype=torch.float32 if name == "codes" else torch.uint8)
        with pytest.raises(
            ArtifactError, match=f"holds x as {saved.dtype}, not {other.dtype}. Fix"
        ):
            load_sharded(state(other), tmp_path / name, "Fix it.")
    half = load_sharded(state(torch.zeros(8, dtype=torch.bfloat16)), tmp_path / "values", "")
    assert half["x"].dtype == torch.bfloat16
