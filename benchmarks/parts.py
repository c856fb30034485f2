"""Where a step's time goes: timers around the functions that do the work, in steps that are not
otherwise timed.
"""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

import megamask.learn.gumbel as step_module
from benchmarks.common import now
from benchmarks.lab import Lab
from megamask.data.batches import BatchPlan
from megamask.model.language_model import LanguageModel
from megamask.parallel.step_draw import StepDraws

REST = "rest of the model"
TOTAL = "total"
ORDER = (
    "data",
    "sampling forward",
    "sampling backward",
    REST,
    "vocabulary forward",
    "vocabulary backward",
    "gradient buffers",
    "clipping",
    "optimizer",
    TOTAL,
)


class Parts:
    """Seconds by part, one record a step. What no timer caught is the rest of the model: matmuls,
    attention, norms.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: list[dict[str, float]] = []

    def add(self, name: str, begin: float) -> None:
        """Count the time since ``begin``."""
        self.steps[-1][name] = self.steps[-1].get(name, 0.0) + now(self.device) - begin

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, timed."""

        def run(*args: Any, **kwargs: Any) -> Any:
            begin = now(self.device)
            try:
                return function(*args, **kwargs)
            finally:
                self.add(name, begin)

        return run

    def medians(self) -> dict[str, float]:
        """Milliseconds by part, medians over the steps."""
        names = {name for step in self.steps for name in step}
        return {
            name: 1000 * statistics.median(step.get(name, 0.0) for step in self.steps)
            for name in ORDER
            if name in names
        }


@contextmanager
def time_parts(lab: Lab, parts: Parts) -> Iterator[None]:
    """Time one step of either side inside the block."""
    parts.steps.append({})
    begin = now(parts.device)
    with ExitStack() as stack:
        for owner, attribute, name in _functions(lab):
            stack.enter_context(
                patch.object(
                    owner, attribute, parts.timed(name, _at_once(getattr(owner, attribute)))
                )
            )
        stack.enter_context(patch.object(BatchPlan, "micro_batches", _timed_batches(parts)))
        stack.enter_context(_vocabulary_timed(lab.masked_model.model, parts))
        yield
    seconds = parts.steps[-1]
    total = now(parts.device) - begin
    seconds |= {REST: total - sum(seconds.values()), TOTAL: total}


def _functions(lab: Lab) -> list[tuple[Any, str, str]]:
    learner = lab.learner
    assert learner is not None
    return [
        *_sampling(lab, learner.step_draws),
        (step_module, "gradient_norm", "clipping"),
        (learner.optimizer, "step", "optimizer"),
        (learner.ddp, "finish_grad_sync", "gradient buffers"),
    ]


def _sampling(lab: Lab, step_draws: StepDraws | None) -> list[tuple[Any, str, str]]:
    """One layer after the other, or all of them together: several at a time may be at work then."""
    if step_draws:
        return [
            (step_draws, "begin", "sampling forward"),
            (step_draws, "end", "sampling backward"),
        ]
    linear = next(iter(lab.masked_model.linears.values()))
    backend = linear.sampler
    return [(backend, "forward", "sampling forward"), (backend, "backward", "sampling backward")]


def _at_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``; what it would yield one by one, it returns as a list."""
    if not inspect.isgeneratorfunction(function):
        return function
    return lambda *args, **kwargs: list(function(*args, **kwargs))


def _timed_batches(parts: Parts) -> Callable[..., Any]:
    original = BatchPlan.micro_batches

    def micro_batches(plan: BatchPlan, step: int) -> Iterator[Any]:
        iterator = original(plan, step)
        fetch = parts.timed("data", lambda: next(iterator, None))
        while (batch := fetch()) is not None:
            yield batch

    return micro_batches


@contextmanager
def _vocabulary_timed(model: LanguageModel, parts: Parts) -> Iterator[None]:
    """Time the way from the hidden states to the losses: forward as a call, backward from the
    gradient of the losses to the gradient of the hidden states.
    """
    original, mark = model.losses, {"backward": 0.0}

    def start_backward(_: torch.Tensor) -> None:
        mark["backward"] = now(parts.device)

    def end_backward(_: torch.Tensor) -> None:
        parts.add("vocabulary backward", mark["backward"])

    def losses(hidden_SBH: torch.Tensor, objective: Any) -> tuple[torch.Tensor, ...]:
        hidden_SBH.register_hook(end_backward)
        begin = now(parts.device)
        found = original(hidden_SBH, objective)
        parts.add("vocabulary forward", begin)
        found[0].register_hook(start_backward)
        return found

    with patch.object(model, "losses", losses):
        yield
