"""Deterministic algorithms hold inside the block alone, and cuBLAS must hear of them in time."""

from __future__ import annotations

import os

import pytest
import torch

from megamask.config import Config
from megamask.errors import ConfigError
from megamask.parallel.determinism import FIXED, WORKSPACE, deterministic
from megamask.parallel.mesh import start

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def state() -> list[bool]:
    cuda = torch.backends.cuda
    fused = [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()]
    return [torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, *fused]


def test_the_setting_holds_inside_a_run_alone() -> None:
    before = state()
    for asked in (False, True):
        config = Config.model_validate(
            {"device": "cpu", "deterministic": asked, "parallel": {"threads": 1}}
        )
        with start(config):
            # on a CPU other kernels of attention would give other bits
            assert state() == ([True, False, *before[2:]] if asked else before)
        assert state() == before


def test_operations_without_a_deterministic_algorithm_are_refused() -> None:
    # On a CPU, PyTorch knows no such operation but a reduction by product into repeated places.
    tensor, index = torch.ones(3), torch.zeros(3, dtype=torch.long)
    with deterministic(True, CPU), pytest.raises(RuntimeError, match="deterministic"):
        tensor.put_(index, torch.arange(3.0), accumulate=False)
    tensor.put_(index, torch.arange(3.0), accumulate=False)


@pytest.mark.parametrize(
    ("variable", "is_running", "refused"),
    [
        (None, False, None),
        (None, True, "deterministic"),
        (FIXED[0], True, None),
        (FIXED[1], False, None),
        (":8:8", False, WORKSPACE),
        (":8:8", True, "deterministic"),
    ],
)
def test_cublas_is_told_before_cuda_starts(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, is_running: bool, refused: str | None
) -> None:
    monkeypatch.setenv(WORKSPACE, variable or "")
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    if variable is None:
        monkeypatch.delenv(WORKSPACE)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: is_running)
    if refused:
        with pytest.raises(ConfigError, match=f"^{refused} = "), deterministic(True, CUDA):
            pass
        return
    with deterministic(True, CUDA):
        assert os.environ[WORKSPACE] == (variable or FIXED[0])
        assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
        assert state() == [True, False, False, False, False]
    with deterministic(False, CUDA):
        pass
