"""The parts of a lease of one GPU, the most valuable first: what each answers, how long it should
take, and its command.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

KERNEL_TESTS = (
    "tests/unit/sparsity/kernels/triton_checks.py",
    "tests/unit/sparsity/kernels/triton_subset_checks.py",
    "tests/unit/model/fused/fused_checks.py",
    "tests/unit/optim/rounding_triton_checks.py",
    "tests/unit/learn/maskpro/score_triton_checks.py",
)
KERNELS_OF_A_LEASE = "not 2-32"  # whose kernels take longest to compile
ONE_KERNEL = "test_hard_masks_differ_only_at_near_ties"  # of the first file, in the interpreter
LEARN_SECONDS = 90  # of the real model; what it learned until then is told
MASKS = ("subset/2:4", "categorical/2:4", "subset/4:8")


@dataclass(frozen=True)
class Situation:
    """What the commands of the parts depend on.

    Attributes:
        device: ``cuda``, or ``cpu`` for the same parts at toy size.
        work: folder for files that do not come back.
        model: a Hugging Face folder or a GGUF file; None where there is no real model.
        recipe: of the learning run.
        steps: of the learning run.
        curve: the figures of the same run on a CPU.
    """

    device: str
    work: Path
    model: Path | None = None
    recipe: Path = Path("configs/recipes/quickstart.yaml")
    steps: int = 300
    curve: Path | None = None

    @property
    def is_toy(self) -> bool:
        """Whether the parts run at toy size."""
        return self.device == "cpu"

    def benchmark(self, module: str, *options: str, toy: tuple[str, ...] = ()) -> list[str]:
        """``python -m benchmarks.MODULE``; ``toy`` replaces the options on a CPU."""
        chosen = ("--threads", "1", *toy) if self.is_toy else options
        return [sys.executable, "-m", f"benchmarks.{module}", "--device", self.device, *chosen]


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: as given to ``--parts``.
        answers: the question that it answers.
        seconds: expected on an H100, imports and compiling included. Measured and rounded up to
            ``step-kernels``, estimated after it.
        limit: seconds after which the part is ended.
        command: its command; None where the situation lacks what it needs.
        writes_figures: whether the command takes ``--json FILE``.
    """

    name: str
    answers: str
    seconds: int
    limit: int
    command: Callable[[Situation], list[str] | None]
    writes_figures: bool = True


def _facts(here: Situation) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu.machine_facts"]


def _speed(here: Situation) -> list[str] | None:
    """The verb speed, whose results lie where those of the part are looked for."""
    program = [sys.executable, "-m", "megamask", "speed", "--model", "llama2-7b"]
    return None if here.is_toy else [*program, f"run_dir={here.work}"]


def _kernels(here: Situation) -> list[str]:
    workers = [] if here.is_toy else ["-n", str(min(12, os.cpu_count() or 1))]
    chosen = [KERNEL_TESTS[0]] if here.is_toy else list(KERNEL_TESTS)
    which = ONE_KERNEL if here.is_toy else KERNELS_OF_A_LEASE
    plain = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", which]
    switch = f"TRITON_INTERPRET={int(here.is_toy)}"
    return ["env", switch, *plain, *workers, *chosen]


def _parity(here: Situation) -> list[str]:
    return here.benchmark("parity", "--patterns", "2:4", "4:8", toy=("--patterns", "2:4"))


def _sampling(here: Situation) -> list[str]:
    return here.benchmark(
        "sampling",
        *("--shapes", "llama2-7b", "--only", "fc1", "fc2", "--masks", *MASKS),
        *("--backends", "triton", "--rounds", "15", "--copy-mib", "2048", "--eager"),
        toy=(
            *("--shapes", "toy", "--only", "qkv", "--masks", "categorical/2:4"),
            *("--rounds", "2", "--copy-mib", "4", "--eager"),
        ),
    )


def _step(*settings: str, accumulate: int = 16) -> Callable[[Situation], list[str]]:
    shape = ("--model", "llama2-7b", "--layers", "4", "--micro", "1", "--seq", "4096")
    toy = ("--model", "toy", "--micro", "1", "--seq", "64", "--rounds", "1", "--no-memory")
    chosen = ("learn.method=subset", *settings)

    def command(here: Situation) -> list[str]:
        batch = ("--accumulate", str(accumulate), "--rounds", "3", "--no-memory")
        return here.benchmark("step", *shape, *batch, *chosen, toy=(*toy, *chosen))

    return command


def _real_model(here: Situation) -> list[str] | None:
    if here.model is None:
        return None
    return [
        *(sys.executable, "-m", "benchmarks.gpu.real_model", "--device", here.device),
        *("--model", str(here.model), "--recipe", str(here.recipe), "--steps", str(here.steps)),
        *("--run-dir", str(here.work / "run"), "--learn-seconds", str(LEARN_SECONDS)),
        *(("--against", str(here.curve)) if here.curve else ()),
    ]


def _whole_model(here: Situation) -> list[str]:
    return here.benchmark(
        "gpu.whole_model", "--model", "llama2-7b", "--seq", "4096", toy=("--model", "toy")
    )


def _alone(module: str) -> Callable[[Situation], list[str]]:
    """A benchmark of ``benchmarks.gpu`` that takes the device alone."""
    return lambda here: [sys.executable, "-m", f"benchmarks.gpu.{module}", "--device", here.device]


def _repeat(*settings: str) -> Callable[[Situation], list[str]]:
    shape, toy = ("--model", "smollm2-135m", "--layers", "8"), ("--model", "toy", "--seq", "64")
    return lambda here: here.benchmark("gpu.repeat", *shape, *settings, toy=(*toy, *settings))


def _optimizers(here: Situation) -> list[str]:
    return here.benchmark(
        "optimizers",
        *("--rows", "4096", "--columns", "4096", "--layers", "8", "--rounds", "5"),
        toy=("--rows", "8", "--columns", "64", "--layers", "1", "--rounds", "1"),
    )


def _plan(here: Situation) -> list[str]:
    return here.benchmark(
        "plan",
        *("--model", "llama2-7b", "--layers", "4", "--micro", "1", "--seq", "4096"),
        toy=("--model", "toy", "--micro", "1", "--seq", "64", "--rounds", "1"),
    )


def _memory(here: Situation) -> list[str]:
    return here.benchmark(
        "memory",
        *("--model", "llama2-7b", "--layers", "4", "--micro", "1", "--seq", "1024"),
        "learn.memory=leanest",
        toy=("--model", "toy", "--micro", "1", "--seq", "64", "learn.memory=leanest"),
    )


def _ceilings(here: Situation) -> list[str] | None:
    return None if here.is_toy else [sys.executable, "-m", "benchmarks.gpu.ceilings"]


def _step_kernels(here: Situation) -> list[str]:
    return here.benchmark(
        "gpu.step_kernels",
        *("--model", "llama2-7b", "--layers", "4", "--micro", "1", "--seq", "4096"),
        *("--accumulate", "2"),
        toy=("--model", "toy", "--micro", "1", "--seq", "64"),
    )


PARTS = (
    Part("facts", "card, clocks, versions, whether names resolve", 5, 40, _facts, False),
    Part("speed", "2:4 inference at 7B shapes, 1 to 16,384 tokens", 30, 70, _speed, False),
    Part("kernels", "do the compiled kernels pass their own tests", 80, 150, _kernels, False),
    Part("parity", "is this device's path the reference's", 60, 120, _parity),
    Part("sampling", "share of copy bandwidth; eager sampling", 25, 60, _sampling),
    Part("step", "masked / dense, a draw per micro-batch", 35, 70, _step()),
    Part(
        "step-one-draw",
        "masked / dense, one draw per step of 16 micro-batches",
        35,
        70,
        _step("learn.sampling.draws=step"),
    ),
    Part("ceilings", "what the card can do; which of several ways", 40, 70, _ceilings),
    Part("step-kernels", "which kernels take a step's time", 35, 70, _step_kernels),
    Part("real-model", "a real model learns: losses, perplexities, speed", 170, 240, _real_model),
    Part("repeat", "are two runs equal bit for bit", 40, 80, _repeat()),
    Part(
        "repeat-deterministic",
        "the same with the setting deterministic, and its price",
        40,
        80,
        _repeat("deterministic=true"),
    ),
    Part("semi", "2:4 inference against dense, bf16 and fp8", 30, 60, _alone("semi_structured")),
    Part("profile", "which bound each sampling kernel hits", 40, 80, _alone("bounds")),
    Part("sanitize", "accesses out of bounds, races", 90, 130, _alone("sanitizer")),
    Part(
        "step-lean",
        "masked / dense with the lean state",
        60,
        90,
        _step("learn.memory=lean", "learn.sampling.draws=step"),
    ),
    Part("whole-model", "LLaMA-2-7B whole: seconds, memory, MFU", 60, 120, _whole_model),
    Part("optimizers", "nanoseconds a logit of each update", 40, 70, _optimizers),
    Part("plan", "planned against measured memory and time", 30, 60, _plan),
    Part("memory", "bytes a weight of the leanest state", 30, 60, _memory),
)
BY_NAME = {part.name: part for part in PARTS}
