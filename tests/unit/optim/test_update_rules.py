"""The registry of update rules, and a rule that is registered from outside the package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from megamask.config import Config
from megamask.config.load import load_config
from megamask.errors import ConfigError
from megamask.learn.method import MOMENTS, StateOf
from megamask.learn.methods import state_bytes
from megamask.optim.base import MaskOptimizer, UpdateRule
from megamask.optim.optimizers import UPDATE_RULES, build_optimizer, find_rule
from megamask.optim.requirements import check_optimizer
from megamask.optim.schedule import learning_rates
from megamask.sparsity.pattern import Pattern
from tests.unit.optim.lean import linear, random_grad, random_logits, take_step


class SignDescent(MaskOptimizer):
    """p <- p - lr sign(g), with a count of positive gradients as its state."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.positive = [torch.zeros_like(one, dtype=torch.int16) for one in self.logits]

    @torch.no_grad()
    def step(self, step: int, rate: float, clip_factor: torch.Tensor) -> None:
        for logits, positive in zip(self.logits, self.positive, strict=True):
            grad: torch.Tensor = logits.main_grad  # type: ignore[attr-defined]
            logits.sub_(rate * grad.sign())
            positive += grad > 0

    def state_tensors(self) -> list[torch.Tensor]:
        return self.positive

    def moments(self) -> dict[str, list[torch.Tensor]]:
        return {"positive": self.positive}

    def load_moments(self, moments: dict[str, list[torch.Tensor]], steps: int) -> None:
        self.positive = moments["positive"]


class SignDescentRule(UpdateRule):
    name = "sign"
    rate_divisor = 7.0
    warning_rate = 0.5
    rate_advice = "such signs are too long"

    def moment_bytes(self, logits_dtype: str, logits_per_group: int) -> float:
        return 2.0

    def check(self, device: str) -> None:
        if device != "cpu":
            raise ConfigError("learn.optimizer.kind", self.name, "an optimizer for CPUs", "Use it.")

    def build(self, section: Any, linears: Sequence[Any], seed: int, **_: Any) -> MaskOptimizer:
        return SignDescent(section, linears, seed)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(UPDATE_RULES, "sign", SignDescentRule())


def with_kind(kind: str, *settings: str) -> Config:
    return load_config(None, ["device=cpu", f"learn.optimizer.kind={kind}", *settings])


def test_every_rule_has_the_name_under_which_it_is_found() -> None:
    assert [find_rule(name).name for name in UPDATE_RULES] == list(UPDATE_RULES)


@pytest.mark.parametrize(("name", "near"), [("lion8bits", "lion8bit"), ("adam", "adamw")])
def test_an_unknown_rule_is_refused_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s)adamw, adamw8bit, lion, lion8bit.*mean {near}"):
        find_rule(name)
    with pytest.raises(ConfigError, match="learn.optimizer.kind"):
        build_optimizer(with_kind(name), [linear(random_logits(2, 8))])


@pytest.mark.usefixtures("registered")
def test_a_rule_from_outside_makes_a_step() -> None:
    start = random_logits(2, 8)
    optimizer = build_optimizer(with_kind("sign"), [linear(start)])
    grad = random_grad(0, start)
    take_step(optimizer, 0, [grad], rate=0.25)
    expected = torch.where(grad > 0, start - 0.25, start + 0.25)
    assert torch.equal(optimizer.logits[0].detach(), expected)
    assert torch.equal(optimizer.moments()["positive"][0], (grad > 0).short())


@pytest.mark.usefixtures("registered")
def test_its_bytes_are_in_the_plan() -> None:
    learn = with_kind("sign", "learn.method=categorical").learn
    parts = state_bytes(StateOf(Pattern(2, 4), learn))
    assert parts[MOMENTS] == 2 * 6 / 4  # six logits for four weights


@pytest.mark.usefixtures("registered")
def test_its_rate_and_its_needs_are_heeded(caplog: pytest.LogCaptureFixture) -> None:
    ours, adamw = (learning_rates(with_kind(kind))[0] for kind in ("sign", "adamw"))
    assert ours == pytest.approx(adamw / 7)
    check_optimizer(with_kind("sign", "learn.optimizer.lr=0.49"))
    assert not caplog.text
    check_optimizer(with_kind("sign", "learn.optimizer.lr=0.5"))
    assert caplog.text.count("such signs are too long") == 1
    with pytest.raises(ConfigError, match="for CPUs"):
        check_optimizer(with_kind("sign").model_copy(update={"device": "cuda"}))
