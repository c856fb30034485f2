"""The order of what ``learn`` checks before it loads the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from megamask.config.load import load_config
from megamask.parallel.mesh import Mesh
from megamask.prepare.run_inputs import LearnInputs
from megamask.process.signals import Interrupted, StopRequest
from megamask.sparsity.kernels.numba_host import NumbaSampler
from megamask.verbs import learn


def test_free_memory_is_that_of_the_backend_that_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Plain PyTorch needs more memory than the kernels that failed."""
    checked: list[str] = []

    def raising(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler")

    def look(inputs: LearnInputs, mesh: Mesh) -> None:
        checked.append(inputs.config.learn.sampling.backend)
        raise Interrupted("SIGTERM")  # nothing is loaded

    monkeypatch.setattr(NumbaSampler, "forward", raising)
    monkeypatch.setattr(learn, "check_early", lambda inputs: None)  # there are no weights
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path / "weights")
    monkeypatch.setattr(learn, "_check_free", look)
    config = load_config(None, ["device=cpu", "parallel.threads=1", f"run_dir={tmp_path}"])
    threads = torch.get_num_threads()
    with pytest.raises(Interrupted):
        learn.run(config, StopRequest())
    torch.set_num_threads(threads)
    assert checked == ["torch"]
