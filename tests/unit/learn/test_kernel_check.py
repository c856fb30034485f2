"""The kernels of a run on one tile: what works is kept, what fails or errs is said and left out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from megamask.config import Config
from megamask.config.load import load_config
from megamask.errors import ConfigError
from megamask.learn.kernel_check import sampling_problem, update_problem, with_proven_kernels
from megamask.learn.maskpro import score_numba
from megamask.optim.lion import Lion
from megamask.parallel.mesh import Mesh, start
from megamask.sparsity.distributions import DISTRIBUTIONS
from megamask.sparsity.draw import Sampled, Site
from megamask.sparsity.kernels.numba_host import NumbaSampler
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement

FORWARD, BACKWARD = NumbaSampler.forward, NumbaSampler.backward
STATISTICS = NumbaSampler.mask_statistics
CPU = torch.device("cpu")


def settings(*words: str) -> Config:
    return load_config(None, ["device=cpu", "parallel.threads=1", *words])


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    threads = torch.get_num_threads()
    with start(settings()) as mesh:
        yield mesh
    torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["auto", "numba"])
@pytest.mark.parametrize(
    "words",
    [
        [],
        ["learn.method=categorical", "learn.sampling.mode=hard", "dtype=fp32"],
        ["learn.method=categorical", "pattern=4:8", "learn.memory=lean"],
        ["learn.memory=leanest"],
        pytest.param(["learn.memory=leanest", "pattern=8:16"], marks=pytest.mark.nightly),
        ["learn.preset=maskpro", "learn.method=maskpro"],
        ["learn.sampling.noise=0"],
        ["learn.sampling.noise=100", "learn.sampling.mode=hard"],
        ["pattern=4:8:pair"],
        ["pattern=4:8:pair", "learn.preset=maskpro", "learn.method=maskpro"],
    ],
    ids=[
        *["subset", "hard", "lean", "leanest", "wide", "maskpro", "quiet", "loud"],
        "pairs",
        "maskpro pairs",
    ],
)
def test_kernels_that_work_are_kept(words: list[str], backend: str, mesh: Mesh) -> None:
    config = settings(*words, f"learn.sampling.backend={backend}")
    assert with_proven_kernels(config, [Pattern.parse(config.pattern)], mesh) == config


def test_the_check_is_cheap(mesh: Mesh) -> None:
    """Kernels that are compiled take 0.02 to 0.1 CPU seconds, and 0.1 to 0.4 the first time."""
    config = settings("learn.memory=leanest")
    with_proven_kernels(config, [Pattern(2, 4)], mesh)
    begin = time.process_time()
    with_proven_kernels(config, [Pattern(2, 4)], mesh)
    assert time.process_time() - begin < 1


def raising(*_: Any, **__: Any) -> Any:
    raise RuntimeError("gcc: fatal error: Python.h is missing\nand forty lines more")


def swapped(*arguments: Any, **named: Any) -> Any:
    """Groups in another order."""
    found = FORWARD(*arguments, **named)
    return Sampled(found.masked.roll(1, dims=1), found.sums, found.hard_codes)


def other_sums(*arguments: Any, **named: Any) -> Any:
    found = FORWARD(*arguments, **named)
    return Sampled(found.masked, 1.1 * found.sums, found.hard_codes)


def other_codes(*arguments: Any, **named: Any) -> Any:
    found = FORWARD(*arguments, **named)
    return Sampled(found.masked, found.sums, found.hard_codes ^ 1)


def not_finite(*arguments: Any, **named: Any) -> Any:
    found = FORWARD(*arguments, **named)
    return Sampled(found.masked * float("nan"), found.sums, found.hard_codes)


def other_gradient(*arguments: Any, **named: Any) -> Any:
    return 1.1 * BACKWARD(*arguments, **named)


def other_mask(*arguments: Any, **named: Any) -> Any:
    """One group of the mask that evaluations and mask files take."""
    mask, confidence = STATISTICS(*arguments, **named)
    mask[0, -1] ^= 1
    return mask, confidence


def other_confidence(*arguments: Any, **named: Any) -> Any:
    mask, confidence = STATISTICS(*arguments, **named)
    return mask, 1.1 * confidence


@pytest.mark.parametrize(
    ("method", "wrong", "said"),
    [
        ("forward", raising, "RuntimeError: gcc: fatal error: Python.h is missing"),
        ("backward", raising, "RuntimeError: gcc: fatal error"),
        ("forward", swapped, "masked weight: "),
        ("forward", not_finite, "masked weight: nan off"),
        ("forward", other_sums, "sums: "),
        ("forward", other_codes, "hard codes: 1 off"),
        ("backward", other_gradient, "gradient: "),
        ("mask_statistics", raising, "RuntimeError: gcc: fatal error"),
        ("mask_statistics", other_mask, "hard mask: 1 off"),
        ("mask_statistics", other_confidence, "confidence: "),
    ],
)
def test_a_wrong_kernel_falls_back_and_is_said(
    method: str,
    wrong: Callable[..., Any],
    said: str,
    mesh: Mesh,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(NumbaSampler, method, wrong)
    config = settings("learn.sampling.backend=auto")
    with caplog.at_level(logging.WARNING):
        found = with_proven_kernels(config, [Pattern(2, 4)], mesh)
    assert found.learn.sampling.backend == "torch"
    assert found == settings("learn.sampling.backend=torch")
    assert len(caplog.messages) == 1 and "forty lines" not in caplog.text
    assert "plain PyTorch, several times slower: the numba kernels fail here" in caplog.text
    assert said in caplog.text
    with pytest.raises(ConfigError, match="learn.sampling.backend = 'numba': .*Use auto, or torch"):
        with_proven_kernels(settings("learn.sampling.backend=numba"), [Pattern(2, 4)], mesh)


@pytest.mark.parametrize(("noise", "wrong"), [(0.0, 1.0), (0.5, 0.6), (1.0, 0.0)])
def test_the_noise_of_the_run_is_checked(
    noise: float, wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(Pattern(2, 4), Placement.whole(6, 37), DISTRIBUTIONS["subset"])
    config = settings(f"learn.sampling.noise={noise}")
    assert sampling_problem(config, site, CPU, "numba") == ""

    def other_noise(self: Any, logits: Any, weight: Any, site: Any, sample: Any, *more: Any) -> Any:
        return FORWARD(self, logits, weight, site, replace(sample, noise=wrong), *more)

    monkeypatch.setattr(NumbaSampler, "forward", other_noise)
    assert sampling_problem(config, site, CPU, "numba").startswith("masked weight: ")


def test_plain_pytorch_needs_no_check(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NumbaSampler, "forward", raising)
    config = settings("learn.sampling.backend=torch")
    assert with_proven_kernels(config, [Pattern(2, 4)], mesh) == config


def test_a_wrong_update_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings("learn.optimizer.kind=lion")
    site = Site(Pattern(2, 4), Placement.whole(6, 37), DISTRIBUTIONS["subset"])
    assert (
        sampling_problem(config, site, CPU, "numba")
        == update_problem(config, site, CPU, "numba")
        == ""
    )
    true = Lion.kernel()
    assert true is not None

    def late(*arguments: Any) -> None:
        true(*arguments)
        arguments[0][0] ^= 1  # the last bit of a row

    monkeypatch.setattr(Lion, "kernel", staticmethod(lambda: late))
    assert "the update of lion gives other bits" in update_problem(config, site, CPU, "numba")
    monkeypatch.setattr(Lion, "kernel", staticmethod(lambda: raising))
    assert update_problem(config, site, CPU, "numba").startswith("RuntimeError: gcc")


@pytest.mark.parametrize("kind", ["set", "ordered"])
def test_a_wrong_update_of_maskpro_is_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["learn.preset=maskpro", "learn.method=maskpro", f"learn.maskpro.score={kind}"]
    config, true = settings(*words), score_numba.add_scores
    site = Site(Pattern(2, 4), Placement.whole(6, 37), DISTRIBUTIONS["subset"])
    assert update_problem(config, site, CPU, "numba") == ""

    def other_draw(logits: Any, site: Any, key: Any, *arguments: Any) -> None:
        true(logits, site, replace(key, step=key.step + 1), *arguments)

    def other_rate(logits: Any, site: Any, key: Any, coefficients: Any, kind: str) -> None:
        true(logits, site, key, [1.01 * one for one in coefficients], kind)

    for wrong in (other_draw, other_rate):
        monkeypatch.setattr(score_numba, "add_scores", wrong)
        assert update_problem(config, site, CPU, "numba").startswith("the update of maskpro: ")
    monkeypatch.setattr(score_numba, "add_scores", raising)
    assert update_problem(config, site, CPU, "numba").startswith("RuntimeError: gcc")
