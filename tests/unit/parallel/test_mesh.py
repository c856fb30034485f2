"""Layouts that cannot work are refused before anything starts; what runs on a CPU leaves no
trace.
"""

from __future__ import annotations

import pytest
import torch

from megamask.config import Config
from megamask.errors import ConfigError
from megamask.parallel.mesh import choose_device, start


def config(**parallel: object) -> Config:
    return Config.model_validate({"device": "cpu", "parallel": {"threads": 1, **parallel}})


def test_one_process_is_its_own_group() -> None:
    before = torch.cuda.current_device
    with start(config()) as mesh:
        assert (mesh.world, mesh.tp, mesh.dp, mesh.rank, mesh.is_main) == (1, 1, 1, 0, True)
        ones = torch.ones(3)
        assert mesh.gather_over_tp(ones)[0] is ones
        assert torch.equal(mesh.sum_over_tp(ones.clone()), ones)
        assert torch.equal(mesh.mean_over_dp(ones.clone()), ones)
        assert [mesh.any(flag) for flag in (True, False)] == [True, False]
        mesh.barrier()
    assert not torch.distributed.is_initialized()
    assert torch.cuda.current_device is before
    with start(config()):  # and again
        pass


def test_an_error_inside_takes_the_groups_down() -> None:
    with pytest.raises(RuntimeError, match="inside"), start(config()):
        raise RuntimeError("inside")
    assert not torch.distributed.is_initialized()


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="device"):
        choose_device("cuda")


@pytest.mark.parametrize(("devices", "expected"), [(1, 0), (2, 1), (8, 3)])
def test_a_task_that_sees_its_own_device_alone_takes_that(
    devices: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "n1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    assert choose_device("auto") == torch.device("cuda", expected)
