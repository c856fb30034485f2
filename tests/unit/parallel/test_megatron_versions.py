"""What differs between versions of Megatron-Core does not show: a checkpoint has one form, and CUDA
is not asked for without CUDA.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from megamask.errors import ArtifactError
from megamask.parallel.megatron_versions import megatron_on_cpu, request_save, results_go_through
from megamask.parallel.mesh import start
from megamask.safe_checkpoint import COMMON, check_common, read_index
from tests.unit.learn.one_rank import tiny_config


def state() -> dict[str, object]:
    """A tensor, and a number that is none."""
    return {"weight": ShardedTensor.from_rank_offsets("weight", torch.arange(6.0)), "steps": 3}


def test_a_checkpoint_has_one_form_and_no_pickled_objects(tmp_path: Path) -> None:
    whole = tmp_path / "megatron"
    whole.mkdir()
    with start(tiny_config()):
        request_save(state(), tmp_path).execute_sync()
        check_common(tmp_path)
        assert list(read_index(tmp_path).state_dict_metadata) == ["weight"]
        loaded = dist_checkpointing.load(state(), str(tmp_path))
        dist_checkpointing.save(state(), str(whole))  # as the version itself would
    assert torch.load(tmp_path / COMMON, weights_only=True) == {"steps": 3}
    form = json.loads((tmp_path / "metadata.json").read_text())
    assert (form["sharded_backend"], form["sharded_backend_version"]) == ("torch_dist", 1)
    assert loaded["steps"] == 3 and torch.equal(loaded["weight"], torch.arange(6.0))
    if not (whole / COMMON).exists():  # from 0.19 on
        with pytest.raises(ArtifactError, match="no tensor needs|which is no tensor"):
            read_index(whole)


def test_a_writer_tells_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 0.17 on Megatron tells the class of the error alone, so a full disk had no name."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    told: list[object] = []

    class Heard(list[object]):
        def put(self, results: object) -> None:
            told.append(results)
            self.append(results)

        def get_nowait(self) -> object:
            return self.pop()

    monkeypatch.setattr(filesystem_async, "_write_item", full)
    lost = pytest.raises(BaseException, match="No space left")
    with start(tiny_config()), lost, results_go_through(Heard):
        request_save(state(), tmp_path).execute_sync()
    (error,) = told
    assert isinstance(error, OSError) and error.errno == 28


def test_cuda_requests_land_on_the_cpu_only_inside() -> None:
    with megatron_on_cpu(active=True):
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.empty(2, device=torch.device("cuda", 3)).device.type == "cpu"
        assert torch.ones(2).cuda().device.type == "cpu"
        current: object = torch.cuda.current_device()
        assert current == torch.device("cpu")
        torch.cuda.synchronize()
        torch.cuda.current_stream().wait_stream(torch.cuda.current_stream())
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError)):
            torch.zeros(2, device="cuda")
