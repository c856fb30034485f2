"""Bytes and seconds of a snapshot by hand for LLaMA-2-7B, and the warning of a short grace."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from megamask.plan.saving import grace_of, grace_warning, saving_lines, saving_of
from megamask.verbs import learn
from tests.unit.plan.test_plan import WEIGHTS_7B, plan

SUBSET = ("learn.method=subset",)  # a logit of 4 bytes and two moments of 4 bytes per weight
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x"}


def test_one_rank_writes_logits_and_moments() -> None:
    saving = saving_of(plan(*SUBSET))
    assert saving.rank_bytes == saving.node_bytes == saving.total_bytes == 12 * WEIGHTS_7B
    assert saving.seconds == pytest.approx(77.7, abs=0.05)  # 77.7 GB at 1 GB/s
    lean = saving_of(plan(*SUBSET, "learn.memory=lean"))
    assert lean.total_bytes == 6 * WEIGHTS_7B
    leanest = saving_of(plan(*SUBSET, "learn.memory=leanest"))
    assert leanest.total_bytes == 4 * WEIGHTS_7B  # momentum in bf16, not in 8 bits


def test_ranks_share_the_work() -> None:
    saving = saving_of(plan(*SUBSET, "parallel.tp=8", dp=8))
    assert saving.rank_bytes == 12 * WEIGHTS_7B / 8
    assert saving.node_bytes == saving.total_bytes == 12 * WEIGHTS_7B  # one replica writes
    assert saving.seconds == 12 * WEIGHTS_7B / 4e9  # the node decides
    divided = saving_of(plan(*SUBSET, "parallel.tp=8", "learn.optimizer.distributed=true", dp=8))
    assert divided.rank_bytes == pytest.approx((4 + 8 / 8) * WEIGHTS_7B / 8, rel=0.01)
    assert divided.total_bytes == pytest.approx(12 * WEIGHTS_7B, rel=0.01)


@pytest.mark.parametrize(("dp", "local"), [(1, 1), (4, 4), (8, 8), (32, 8)])
def test_replicas_of_one_node_write_the_logits_once(dp: int, local: int) -> None:
    """Each replica of one rank writes the moments that it updates, the first the logits too."""
    saving = saving_of(plan(*SUBSET, "learn.optimizer.distributed=true", dp=dp))
    moments = saving.rank_bytes - 4 * WEIGHTS_7B
    assert moments == pytest.approx(8 * WEIGHTS_7B / dp, rel=0.03)  # 128 layers, dealt whole
    assert saving.node_bytes == 4 * WEIGHTS_7B + local * moments
    assert saving.rank_bytes <= saving.node_bytes <= saving.total_bytes
    assert saving.total_bytes == 4 * WEIGHTS_7B + dp * moments


def test_maskpro_has_no_moments() -> None:
    saving = saving_of(plan("learn.preset=maskpro", "learn.method=maskpro"))
    assert saving.total_bytes == 4 * WEIGHTS_7B


def test_who_ends_a_run_and_when() -> None:
    config = plan("launch.warning=120").config
    assert grace_of(config, TORCHRUN)[1] == 30
    assert grace_of(config, {**TORCHRUN, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"})[1] == 600
    assert grace_of(config, {"SLURM_JOB_ID": "7"}) == ("Slurm (launch.warning)", 120)
    assert grace_of(config, {})[1] == float("inf")


def test_a_grace_that_is_too_short_is_said() -> None:
    work = plan(*SUBSET)
    saving = saving_of(work)
    said = grace_warning(work.config, saving, TORCHRUN)
    assert said is not None and "78 GB takes about 78 s" in said and "30 s after" in said
    assert "wait for one and write another, 155 s" in said
    for seconds, warns in ((120, True), (160, False)):  # between one snapshot and two
        grace = {**TORCHRUN, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(seconds)}
        assert bool(grace_warning(work.config, saving, grace)) == warns
        alone = plan(*SUBSET, "learn.snapshot.background=false").config
        assert grace_warning(alone, saving, grace) is None
    assert grace_warning(work.config, saving, {"SLURM_JOB_ID": "7"}) is None
    assert grace_warning(work.config, saving, {}) is None
    small = plan("learn.method=subset", model="smollm2-135m")
    assert grace_warning(small.config, saving_of(small), TORCHRUN) is None
    lines = "\n".join(saving_lines(work))
    assert "77.7 GB" in lines and "longer than torchrun's own grace" in lines
    assert "host memory" in lines and "about 155 s for both" in lines
    assert "between two steps" in "\n".join(
        saving_lines(plan(*SUBSET, "learn.snapshot.background=false"))
    )
    assert "longer than" not in "\n".join(saving_lines(small))


def test_a_copy_that_the_host_may_not_hold_is_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy has the bytes of the snapshot, written in the background or not."""
    work = plan(*SUBSET, "parallel.tp=8")
    for background in ("true", "false"):
        there = plan(*SUBSET, "parallel.tp=8", f"learn.snapshot.background={background}")
        assert "a copy of 77.7 GB in the host memory" in "\n".join(saving_lines(there))
    monkeypatch.setattr(learn, "grace_warning", lambda *_: None)
    inputs: Any = SimpleNamespace(config=work.config, arch=work.arch)
    for available, device, warns in (
        (77e9, "cuda", True),
        (78e9, "cuda", False),
        (0, "cpu", False),
    ):
        memory = SimpleNamespace(available=available)
        monkeypatch.setattr(psutil, "virtual_memory", lambda found=memory: found)
        mesh: Any = SimpleNamespace(device=torch.device(device), is_main=True, dp=1)
        caplog.clear()
        learn._warn_of_snapshots(inputs, mesh)
        assert ("78 GB in the host memory of a node, and 77 GB" in caplog.text) == warns
        assert bool(caplog.records) == warns
