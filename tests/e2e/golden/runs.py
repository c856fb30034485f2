"""Runs whose masks are kept in this folder: the debug recipe, one run per method and memory choice.

The masks were made by the code of commit d3ce1bf. They change only on purpose, with
``python -m tests.e2e.golden``; a commit that does so says why the masks changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from megamask import load_masks
from megamask.masks.file import MaskSet
from tests.e2e.program import in_process

FOLDER = Path(__file__).resolve().parent
LONG, SHORT = 20, 2  # steps of the two runs of a method
ALLOWED = 0.005  # share of groups that may differ on another kind of machine
COMMON = (
    "learn.monitor.evaluate_every=0",
    "learn.snapshot.every=50",
    "parallel.threads=1",
    "learn.prior.margins=false",
    "learn.sampling.noise=1",
)
METHODS: dict[str, tuple[str, ...]] = {
    "subset": (),
    "subset_graded": ("learn.prior.margins=true", "learn.sampling.noise=0"),
    "subset_one_draw": ("learn.sampling.draws=step",),
    "subset_lean": ("learn.memory=lean",),
    "subset_leanest": ("learn.memory=leanest", "learn.optimizer.lr=5e-3"),
    "subset_hard_4_8": ("pattern=4:8", "learn.prior.mask=null", "learn.sampling.mode=hard"),
    "subset_distilled": ("learn.distillation.share=0.5", "learn.distillation.top_k=8"),
    "categorical": ("learn.method=categorical", "learn.sampling.initial_noise=true"),
    "maskpro": (
        "learn.method=maskpro",
        "learn.maskpro.masks=2",
        "learn.maskpro.samples=16",
        "learn.maskpro.initial_logit=1.0",
        "learn.maskpro.lr=500",
    ),
}


def learn(name: str, steps: int, settings: list[str]) -> MaskSet:
    """The masks of method ``name`` after ``steps`` steps.

    Args:
        name: a key of METHODS.
        steps: length of the run; the schedules end there.
        settings: overrides that name a run folder with shards and one-shot masks, the model and
            the data.
    """
    finished = in_process("learn", *settings, f"learn.steps={steps}", *COMMON, *METHODS[name])
    assert finished.code == 0, finished.stderr
    run_dir = next(word for word in settings if word.startswith("run_dir=")).partition("=")[2]
    return load_masks(Path(run_dir) / "masks" / "learned.safetensors")


def path(name: str, steps: int) -> Path:
    """The file that keeps the masks of a run."""
    return FOLDER / f"{name}-{steps}-steps.safetensors"


def share_that_differs(found: MaskSet, expected: MaskSet) -> float:
    """Share of groups with another candidate index."""
    assert found.pattern == expected.pattern
    assert set(found) == set(expected)
    pairs = [(found.index(name), expected.index(name)) for name in expected]
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


def machine() -> dict[str, str]:
    """All that decides how floating-point sums are rounded: the processor, the instruction sets in
    use, the libraries. Builds of PyTorch with and without CUDA round alike on a CPU.
    """
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    facts = dict(re.findall(r"(?m)^(model name|cpu family|model)\s*: (.*)$", text))
    names = ("torch", "numba", "llvmlite", "numpy")
    libraries = {name: version(name).partition("+")[0] for name in names}
    capability = torch.backends.cpu.get_cpu_capability()
    return {"processor": ", ".join(facts.values()), "capability": capability, **libraries}


def same_machine() -> bool:
    """Whether this machine rounds as the machine did that made the masks."""
    return bool(machine() == json.loads((FOLDER / "machine.json").read_text()))


def regenerate(prepare: Callable[[], list[str]]) -> None:
    """Write every file again.

    Args:
        prepare: makes a fresh run folder and returns the overrides that name it.
    """
    for name in METHODS:
        for steps in (LONG, SHORT):
            masks = learn(name, steps, prepare())
            path(name, steps).write_bytes(masks.path.read_bytes())
            print(path(name, steps).name)
    (FOLDER / "machine.json").write_text(json.dumps(machine(), indent=2) + "\n")
