"""The kernels that are compiled without a GPU are those that learning launches."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from benchmarks import step
from benchmarks.gpu import learning_kernels
from benchmarks.gpu.learning_kernels import Shape
from benchmarks.gpu.lease_parts import MASKS, PARTS, Situation
from benchmarks.gpu.whole_model import candidates
from benchmarks.lab import read_config
from megamask.config import Config, load_config
from megamask.learn.maskpro.samples import Reused
from megamask.learn.methods import find_method
from megamask.model import build
from megamask.optim.stochastic_rounding import RoundingOptimizer
from megamask.parallel import masked_linear
from megamask.sparsity.distribution import Distribution
from megamask.sparsity.draw import Sampled
from megamask.sparsity.kernels import triton_host
from megamask.sparsity.operator import sampler_for
from tests.unit.learn.one_rank import RandomTokens, tiny_config, tiny_masked_model, tiny_plan

REPO = Path(__file__).resolve().parents[3]
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MICRO_BATCHES = 4
Variant = tuple[Any, ...]
Record = Callable[[], set[Variant]]


def variant(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Variant:
    """What decides which code a launch needs: types, alignments, and numbers that Triton takes for
    constants.
    """

    def seen(name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return str(value.dtype), value.data_ptr() % 16 == 0
        if isinstance(value, int) and name == "groups":  # the only number that is not CHANGING
            return value == 1, value % 16 == 0
        return type(value).__name__

    names = [name for name in kernel.arg_names if name not in constants]
    told = {name: seen(name, value) for name, value in zip(names, arguments, strict=True)}
    given = {
        name: seen(name, value) if isinstance(value, torch.Tensor) else value
        for name, value in constants.items()
    }
    return (kernel.fn.__module__, kernel.fn.__name__, *sorted(told.items()), *sorted(given.items()))


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Record:
    """Launches are recorded, and interpreted under TRITON_INTERPRET; the variants since the last
    call.
    """
    variants: set[Variant] = set()
    true = triton_host.launch

    def launch(
        kernel: Any, programs: int, on: torch.Tensor, *arguments: Any, **constants: Any
    ) -> None:
        variants.add(variant(kernel, arguments, constants))
        if IS_INTERPRETED:
            true(kernel, programs, on, *arguments, **constants)

    def recorded() -> set[Variant]:
        found = set(variants)
        variants.clear()
        return found

    monkeypatch.setattr(triton_host, "launch", launch)
    monkeypatch.setattr(RoundingOptimizer, "by_numba", RoundingOptimizer.by_triton)
    return recorded


class Launching:
    """The sampler of Triton; without its interpreter, plain PyTorch gives the results."""

    def __init__(self, distribution: Distribution) -> None:
        self.triton, self.plain = (sampler_for(one, distribution) for one in ("triton", "torch"))

    def forward(self, *arguments: Any, **named: Any) -> Sampled:
        found = self.triton.forward(*arguments, **named)
        return found if IS_INTERPRETED else self.plain.forward(*arguments, **named)

    def backward(self, *arguments: Any, **named: Any) -> torch.Tensor:
        found = self.triton.backward(*arguments, **named)
        return found if IS_INTERPRETED else self.plain.backward(*arguments, **named)

    def mask_statistics(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.triton.mask_statistics(*arguments)
        return found if IS_INTERPRETED else self.plain.mask_statistics(*arguments)


def config_of(learn: dict[str, Any], sampling: dict[str, Any], dtype: str = "bf16") -> Config:
    """Four micro-batches a step on Triton."""
    batch = {"micro_batch": 1, "global_batch": MICRO_BATCHES}
    config = tiny_config({**batch, "sampling": {"backend": "triton", **sampling}, **learn})
    return config.model_copy(update={"dtype": dtype})


def learned(config: Config, monkeypatch: pytest.MonkeyPatch) -> set[Shape]:
    """One step of a tiny model and its hard masks; the shapes of its linears."""
    monkeypatch.setattr(build, "choose_backend", lambda name, *_: name)
    monkeypatch.setattr(masked_linear, "sampler_at", lambda site, _: Launching(site.distribution))
    with tiny_masked_model(config) as (mesh, masked_model):
        plan = tiny_plan(config, mesh)
        plan = dataclasses.replace(plan, dataset=Reused(RandomTokens(), None, 0))
        find_method(config.learn.method).build(config, mesh, masked_model).step(0, plan)
        linears = list(masked_model.linears.values())
        for linear in linears:
            linear.hard_codes()
        return {Shape(one.weight.shape[0], one.weight.shape[1], one.stride) for one in linears}


SUMS: dict[str, Any] = {"draws": 2}
AT_NIGHT = pytest.mark.nightly
RUNS = [
    pytest.param({}, {}, "bf16", id="a draw each", marks=AT_NIGHT),
    pytest.param({}, {"draws": "step"}, "bf16", id="one draw", marks=AT_NIGHT),
    pytest.param({}, SUMS, "bf16", id="draws of two"),
    pytest.param({}, {"draws": 3, "noise": 0.0}, "bf16", id="draws of three and one, quiet"),
    pytest.param({"method": "categorical", "memory": "lean"}, SUMS, "bf16", id="lean"),
    pytest.param({"memory": "leanest"}, {}, "bf16", id="leanest", marks=AT_NIGHT),
    pytest.param({}, {"mode": "hard"}, "fp32", id="hard, fp32"),
    pytest.param({"method": "maskpro"}, {}, "bf16", id="maskpro"),
    pytest.param(
        {"state": {"logits": "bf16", "grads": "fp32"}, "optimizer": {"kind": "lion"}},
        SUMS,
        "bf16",
        id="bf16 logits, fp32 gradients",
        marks=AT_NIGHT,
    ),
]


@pytest.mark.parametrize(("learn", "sampling", "dtype"), RUNS)
def test_what_learning_launches_is_compiled(
    learn: dict[str, Any],
    sampling: dict[str, Any],
    dtype: str,
    record: Record,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of(learn, sampling, dtype)
    shapes = learned(config, monkeypatch)
    launched = record()
    for shape in shapes:
        learning_kernels.learn(config, shape)
    assert record() == launched
    if sampling is SUMS and not learn:  # a gradient that is added to the buffer, of a sum in fp32
        kinds = [dict(one[2:]) for one in launched if one[1] == "backward"]
        assert {(one["ADD"], one["GRAD_BITS"]) for one in kinds} == {(False, 32), (True, 32)}


@pytest.mark.nightly
def test_the_same_with_kernels_that_are_interpreted() -> None:
    name = test_what_learning_launches_is_compiled.__name__
    cases = [f"{__file__}::{name}[{one}]" for one in ("draws of two", "maskpro")]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *cases],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    assert "2 passed" in child.stdout


def test_the_kernels_of_every_part_that_learns_are_compiled(record: Record) -> None:
    """A part with other settings or masks than ``learning_kernels.runs`` would compile during the
    lease.
    """
    shape = Shape(64, 256, blocks=2)
    compiled = {}
    for masks in MASKS:
        for config in learning_kernels.runs(masks, []):
            learning_kernels.learn(config, shape)
        compiled[masks] = record()
    configs: list[Config] = []
    for part in PARTS:
        command = part.command(Situation("cuda", REPO)) or []
        if set(command) & {f"benchmarks.{one}" for one in ("step", "plan", "memory", "gpu.repeat")}:
            configs.append(read_config(step.read_options(command[command.index("-m") + 2 :])))
    for settings in candidates():  # of the part whole-model
        batch = ["learn.micro_batch=1", "learn.global_batch=2", "dtype=bf16"]
        configs.append(load_config(None, [*batch, *settings]))
    configs.append(load_config(REPO / Situation.recipe, []))  # of the part real-model
    for config in configs:
        learning_kernels.learn(config, shape)
        distribution = find_method(config.learn.method).distribution
        assert record() <= compiled[f"{distribution.name}/{config.pattern}"], config.learn
    learning_kernels.learn(load_config(None, ["learn.sampling.mode=hard"]), shape)
    assert not record() <= compiled["subset/2:4"]
