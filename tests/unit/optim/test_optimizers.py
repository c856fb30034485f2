"""Settings that are refused, the way from the settings to an optimizer, and AdamW with the clip
factor inside its update.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megamask.config.load import build_config, load_config
from megamask.errors import ConfigError
from megamask.optim.adamw import AdamW
from megamask.optim.adamw_bf16 import AdamWBf16
from megamask.optim.optimizers import build_optimizer, decay_rates, find_rule
from megamask.optim.requirements import check_optimizer
from tests.unit.optim.lean import SEED, linear, random_grad, random_logits, section, take_step

ONE_RANK: Any = SimpleNamespace(sum_over_tp=lambda one: one)


@pytest.mark.parametrize(
    ("kind", "logits", "grads", "key", "fix"),
    [
        ("adamw", "fp32", "bf16", "learn.state.grads", "Use learn.state.logits=bf16 too"),
        ("lion8bit", "fp32", "bf16", "learn.state.grads", "Use learn.state.logits=bf16 too"),
        ("adamw", "bf16", "fp32", None, ""),
        ("adamw", "bf16", "bf16", None, ""),
        ("lion", "bf16", "fp32", None, ""),
        ("lion", "fp32", "fp32", None, ""),
        ("lion8bit", "bf16", "bf16", None, ""),
        ("adamw", "fp32", "fp32", None, ""),
    ],
)
def test_combinations(kind: str, logits: str, grads: str, key: str | None, fix: str) -> None:
    config = build_config(
        {"learn": {"state": {"logits": logits, "grads": grads}, "optimizer": {"kind": kind}}}
    )
    if key is None:
        check_optimizer(config)
    else:
        with pytest.raises(ConfigError, match=f"(?s){key} = .*{fix}"):
            check_optimizer(config)


@pytest.mark.parametrize(
    ("kind", "epsilon", "clip", "is_refused"),
    [
        ("adamw", "[1e-8,0.1]", "0", True),
        ("adamw8bit", "[1e-8,1e-9]", "0.0", True),
        ("adamw", "[1e-8,0]", "0", False),
        ("adamw", "[1e-8,0.1]", "0.5", False),
        ("lion", "[1e-8,0.1]", "0", False),  # Lion adds no epsilon
    ],
)
def test_an_epsilon_in_units_of_no_clip_is_refused(
    kind: str, epsilon: str, clip: str, is_refused: bool
) -> None:
    words = [f"kind={kind}", f"epsilon={epsilon}", f"clip={clip}"]
    config = load_config(None, ["device=cpu", *(f"learn.optimizer.{word}" for word in words)])
    if not is_refused:
        check_optimizer(config)
        return
    with pytest.raises(ConfigError, match=r"epsilon = \[.*learn.optimizer.epsilon=\[1e-08,0\]"):
        check_optimizer(config)


@pytest.mark.parametrize("memory", ["default", "lean", "leanest"])
def test_memories_are_allowed(memory: str) -> None:
    check_optimizer(load_config(None, [f"learn.memory={memory}"]))


def test_lean_memory_keeps_the_optimizer() -> None:
    assert (
        load_config(None, ["learn.memory=lean"]).learn.optimizer
        == load_config(None).learn.optimizer
    )


@pytest.mark.parametrize(
    ("settings", "times"),
    [
        (["learn.optimizer.kind=lion", "learn.optimizer.lr=2e-3"], 1),
        # derived, and divided for Lion already
        (["learn.optimizer.kind=lion", "learn.steps=1", "learn.prior.margins=false"], 0),
        (["learn.optimizer.kind=lion"], 0),
        (["learn.memory=leanest", "learn.optimizer.lr=1e-3"], 1),
        (["learn.memory=leanest"], 0),
        (["learn.memory=lean", "learn.optimizer.lr=1e-3"], 0),
    ],
)
def test_a_rate_of_adamw_for_lion_is_warned_of_once(
    settings: list[str], times: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(None, settings)
    check_optimizer(config)
    build_optimizer(config, [linear(random_logits(2, 8))])
    assert caplog.text.count("use about a third of AdamW's learning rate") == times


def test_the_logits_dtype_decides_between_the_two_adamw() -> None:
    for state, kind in (("fp32", AdamW), ("bf16", AdamWBf16)):
        config = load_config(None, [f"learn.state.logits={state}"])
        assert type(build_optimizer(config, [linear(random_logits(2, 8))])) is kind


@pytest.mark.parametrize(
    ("words", "decay"),
    [
        (["steps=1"], 0.5),  # over two steps, the least
        (["steps=15"], 0.6),
        (["steps=20"], 0.7),
        (["steps=60"], 0.9),
        (["steps=2000"], 0.9),
        (["steps=20", "state.logits=bf16"], 0.7),
        (["steps=20", "optimizer.betas=[0.8,0.99]"], 0.8),
        (["steps=20", "preset=maskllm"], 0.9),  # the paper's, in a run of any length
        (["steps=20", "preset=roi"], 0.9),
    ],
)
def test_the_mean_gradient_of_adamw_spans_a_sixth_of_the_steps_at_most(
    words: list[str], decay: float
) -> None:
    config = load_config(None, [f"learn.{word}" for word in words])
    optimizer = build_optimizer(config, [linear(random_logits(2, 8))])
    gradient = random_grad(0, optimizer.logits[0])
    take_step(optimizer, 0, [gradient], rate=1e-3, clip=1.0)
    # After a step from nothing the mean is (1 - decay) times the gradient; bf16 has 8 bits.
    mean, kept = optimizer.moments()["exp_avg"][0].float(), (1 - decay) * gradient
    assert torch.allclose(mean, kept, rtol=2**-7, atol=0)
    for other in {0.0, 0.5, 0.6, 0.7, 0.8, 0.9} - {decay}:
        assert not torch.allclose(mean, (1 - other) * gradient, rtol=2**-7, atol=0)


def test_lion_has_the_usual_decays_in_a_run_of_any_length() -> None:
    """The derivation was tried with AdamW alone."""
    for steps in (1, 20, 2000):
        words = [f"learn.steps={steps}", "learn.optimizer.kind=lion"]
        optimizer = build_optimizer(load_config(None, words), [linear(random_logits(2, 8))])
        assert optimizer.section.decays == (0.9, 0.99)


def no_module(*missing: str) -> Callable[[str], Any]:
    found = importlib.util.find_spec
    return lambda name, *rest: None if name in missing else found(name, *rest)


def test_what_8_bit_adamw_needs_is_asked_for_early(monkeypatch: pytest.MonkeyPatch) -> None:
    config = build_config({"device": "cpu", "learn": {"optimizer": {"kind": "adamw8bit"}}})
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", no_module("torchao"))
        with pytest.raises(
            ConfigError, match=r"(?s)learn.optimizer.kind.*pip install -c .* -e '\.\[eight-bit\]'"
        ):
            check_optimizer(config)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", no_module("triton"))
        with pytest.raises(ConfigError, match="Install triton"):
            find_rule("adamw8bit").check("cuda")
    pytest.importorskip("torchao")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"(?s)g\+\+ is not there.*CXX"):
        check_optimizer(config)


def clipped_by_hand(start: torch.Tensor, steps: int, clip: float) -> torch.Tensor:
    """PyTorch's plain AdamW on gradients that were multiplied before."""
    logits = torch.nn.Parameter(start.double())
    adamw = torch.optim.AdamW(
        [logits], lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=False, foreach=False
    )
    for step in range(steps):
        logits.grad = random_grad(step, start).double() * clip
        adamw.step()
    return logits.detach()


def test_adamw_clips_inside_its_update() -> None:
    start = random_logits()
    ours = AdamW(section("adamw"), [linear(start)], SEED)
    for step in range(5):
        take_step(ours, step, [random_grad(step, start)], rate=1e-3, clip=0.01)
    # Ratios of fp32 moments to 1e-6 or so, times five steps of 1e-3.
    assert float((ours.logits[0].detach() - clipped_by_hand(start, 5, 0.01)).abs().max()) < 5e-8
    assert (
        float((ours.logits[0].detach() - clipped_by_hand(start, 5, 1.0)).abs().max()) > 1e-7
    )  # eps is all that is not scale free
    assert float(ours.moments()["exp_avg"][0].abs().max()) < 0.01 * 0.01 * 5
    assert ours.logits[0].grad is None
    assert ours.steps_done() == 5


def test_adamw_goes_on_exactly() -> None:
    start = random_logits()
    ours = AdamW(section("adamw"), [linear(start)], SEED)
    for step in range(3):
        take_step(ours, step, [random_grad(step, start)])
    again = AdamW(section("adamw"), [linear(ours.logits[0].detach())], SEED)
    again.load_moments(
        {name: [one.clone() for one in ones] for name, ones in ours.moments().items()},
        ours.steps_done(),
    )
    for one in (ours, again):
        take_step(one, 3, [random_grad(3, start)])
    assert torch.equal(ours.logits[0], again.logits[0])


@pytest.mark.parametrize(
    ("tp", "shape", "rms"), [(1, (1, 4, 25), 0.1), (2, (1, 2, 25), 0.1), (1, (4, 4, 25), 0.05)]
)
def test_epsilon_is_in_units_of_a_clipped_gradient(
    tp: int, shape: tuple[int, int, int], rms: float
) -> None:
    """A gradient of norm 1 over 100 logits has the root mean square 0.1, also where a rank holds
    half of them; over 400, 0.05.
    """
    chosen = [
        "device=cpu",
        f"parallel.tp={tp}",
        "learn.optimizer.epsilon=[1e-3, 0.5]",
        "learn.optimizer.clip=2",
    ]
    optimizer: Any = build_optimizer(load_config(None, chosen), [linear(torch.zeros(shape))])
    assert optimizer.adamw.param_groups[0]["eps"] == pytest.approx(1e-3 + 0.5 * 2 * rms)


@pytest.mark.parametrize(
    ("settings", "decays"),
    [
        (["learn.memory=leanest"], (0.9, 0.99)),
        (["learn.memory=leanest", "learn.preset=maskllm"], (0.9, 0.99)),
        (["learn.optimizer.kind=lion8bit"], (0.9, 0.99)),
        # another rule than leanest's has its own decays
        (["learn.memory=leanest", "learn.optimizer.kind=adamw"], (0.7, 0.95)),
        (["learn.memory=leanest", "learn.optimizer.betas=[0.8, 0.9]"], (0.8, 0.9)),
    ],
)
def test_decays_are_those_of_the_rule(settings: list[str], decays: tuple[float, float]) -> None:
    found = decay_rates(load_config(None, ["learn.steps=20", *settings]))
    assert found == pytest.approx(decays)
