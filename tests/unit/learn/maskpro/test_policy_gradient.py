"""MaskPro's settings and refusals, the order of its samples, the cached losses of the initial
masks, the baselines.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from megamask.config.load import load_config
from megamask.data.batches import BatchPlan
from megamask.errors import ConfigError, LearningError
from megamask.learn.maskpro.policy_gradient import MaskPro, Tracker, advantages
from megamask.learn.maskpro.policy_method import PolicyMethod
from megamask.learn.maskpro.samples import InitialLosses, Reused, numbers_of
from megamask.sparsity.pattern import Pattern
from tests.unit.learn.one_rank import RandomTokens, tiny_config, tiny_masked_model, tiny_plan


class Numbers:
    """Sample i holds the number i."""

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"tokens": torch.full((3,), number), "labels": torch.full((3,), number + 1)}


def test_samples_come_again_in_another_order_every_epoch() -> None:
    reused = Reused(Numbers(), samples=10, seed=3)
    epochs = [
        [int(reused[place]["tokens"][0]) for place in range(10 * epoch, 10 * epoch + 10)]
        for epoch in range(4)
    ]
    assert epochs[0] == list(range(10))
    assert all(sorted(epoch) == epochs[0] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    again = Reused(Numbers(), samples=10, seed=3)
    assert [again.number(place) for place in range(39, -1, -1)] == [
        number for epoch in epochs[::-1] for number in epoch[::-1]
    ]
    assert [Reused(Numbers(), 10, seed=4).number(place) for place in range(10, 20)] != epochs[1]
    assert [Reused(Numbers(), None, seed=3).number(place) for place in (0, 7, 1000)] == [0, 7, 1000]


class Meter:
    """Counts what it computes. A sample's loss tells what it was computed with: its last digits
    would do so in a real model.
    """

    def __init__(self) -> None:
        self.blocks: list[list[int]] = []

    def __call__(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        assert torch.equal(labels, tokens + 1)
        self.blocks.append(tokens[:, 0].tolist())
        return tokens[:, 0].double() + 1e-3 * len(tokens) + 1e-6 * tokens[0, 0]


def losses_of(
    learning: BatchPlan, meter: Meter, micro_batch: int, steps: range
) -> dict[int, float]:
    initial = InitialLosses(learning.dataset, micro_batch, meter)
    found: dict[int, float] = {}
    for step in steps:
        for number, tokens, _ in learning.micro_batches(step):
            numbers = numbers_of(learning, step, number)
            assert numbers == tokens[:, 0].tolist()
            found.update(zip(numbers, initial(numbers).tolist(), strict=True))
    return found


def test_initial_losses_are_found_once_and_do_not_depend_on_who_asks() -> None:
    plans = [
        BatchPlan(Reused(Numbers(), 10, seed=3), 8, 4, replicas, replica)
        for replicas, replica in ((1, 0), (2, 0), (2, 1))
    ]
    meters = [Meter(), Meter(), Meter()]
    whole, left, right = (
        losses_of(plan, meter, 4, range(6)) for plan, meter in zip(plans, meters, strict=True)
    )
    assert sorted(whole) == list(range(10))
    assert meters[0].blocks == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]  # every sample once, although read five times
    assert left.items() <= whole.items() and right.items() <= whole.items()
    assert losses_of(plans[0], Meter(), 4, range(4, 6)).items() <= whole.items()  # after a resume
    assert losses_of(plans[0], Meter(), 5, range(6)) != whole  # the digits tell


def test_initial_losses_of_endless_samples_are_not_kept() -> None:
    initial = InitialLosses(Reused(Numbers(), None, seed=3), 2, Meter())
    assert initial([0, 1]).tolist() == pytest.approx([0.002, 1.002])
    assert initial.known == {}


def test_the_tracker_is_the_papers() -> None:
    tracker, delta = Tracker(0.9), 0.0
    for residual in (0.3, -0.1, 0.2):
        delta = 0.9 * delta + 0.1 * residual
        assert advantages("tracker", [residual], tracker) == pytest.approx([residual - delta])
    restored = Tracker(0.9)
    restored.delta = tracker.delta
    assert advantages("tracker", [1.0, 2.0], restored) == advantages("tracker", [1.0, 2.0], tracker)


def test_other_baselines() -> None:
    assert advantages("leave_one_out", [1.0, 2.0, 6.0], Tracker(0.9)) == [1 - 4.0, 2 - 3.5, 6 - 1.5]
    assert advantages("hard_mask", [0.5, -0.1], Tracker(0.9)) == [0.5, -0.1]


def test_the_preset_holds_the_reference_settings() -> None:
    config = load_config(None, ["learn.preset=maskpro"])
    learn = config.learn
    assert (learn.method, learn.prior.mask) == ("maskpro", "sparsegpt")
    assert learn.sampling.mode == "hard"
    assert (learn.steps, learn.global_batch, config.data.seq_length) == (10_000, 32, 128)
    section = learn.maskpro
    assert (section.lr, section.initial_logit, section.samples) == (50, 10, 512)
    assert (section.masks, section.baseline, section.tracker_decay) == (1, "tracker", 0.99)
    PolicyMethod().check(config, Pattern.parse(config.pattern))


def test_one_word_changes_the_method() -> None:
    config = load_config(None, ["learn.method=maskpro"])
    assert config.learn.sampling.mode == "hard" and not config.learn.sampling.initial_noise
    PolicyMethod().check(config, Pattern.parse(config.pattern))


REFUSED: dict[str, tuple[str, str, str]] = {
    "learn.memory=lean": ("learn.state.logits", "fp32", "Leave out learn.memory"),
    "learn.prior.mask=null": ("learn.prior.mask", "starts from a prior mask", "sparsegpt"),
    "learn.sampling.initial_noise=true": (
        "learn.sampling.initial_noise",
        "starts from a prior mask",
        "false",
    ),
    "learn.sampling.noise=0.5": (
        "learn.sampling.noise = 0.5",
        "1 with learn.method=maskpro",
        "Set it to 1",
    ),
    "learn.prior.strength=0": ("learn.prior.strength", "above 0", "learn.maskpro.initial_logit"),
    "learn.distillation.share=1": (
        "learn.distillation.share",
        "0 with learn.method=maskpro",
        "Set it to 0",
    ),
    "learn.maskpro.baseline=leave_one_out": (
        "learn.maskpro.masks",
        "2 or more",
        "learn.maskpro.masks to 2",
    ),
    "learn.maskpro.masks=3": (
        "learn.maskpro.masks",
        "a divisor of the step's micro-batches",
        "learn.maskpro.data=shared",
    ),
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_cannot_work_is_refused(override: str) -> None:
    key, allowed, fix = REFUSED[override]
    with pytest.raises(ConfigError) as refused:
        config = load_config(None, ["learn.method=maskpro", "learn.global_batch=16", override])
        PolicyMethod().check(config, Pattern.parse(config.pattern))
    message = str(refused.value)
    assert key in message and allowed in message and fix in message


@pytest.mark.parametrize("value", [0, -1.0, "x", "inf"])
@pytest.mark.parametrize("key", ["lr", "initial_logit", "masks", "samples"])
def test_values_out_of_range_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"learn\.maskpro\.{key}"):
        load_config(None, [f"learn.maskpro.{key}={value}"])


def test_a_compared_loss_that_is_not_finite_changes_no_logit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tracker would keep it, and every logit become NaN."""
    config = tiny_config(
        {"method": "maskpro", "prior": {"mask": "sparsegpt"}, "maskpro": {"samples": 4}}
    )
    with tiny_masked_model(config) as (mesh, masked_model):
        learner = MaskPro(config, mesh, masked_model)
        plan = replace(tiny_plan(config, mesh), dataset=Reused(RandomTokens(), 4, 1))
        learner.step(0, plan)
        before = [logits.detach().clone() for logits in masked_model.mask_logits]
        delta, compared = learner.tracker.delta, learner._compared_losses
        monkeypatch.setattr(learner, "_compared_losses", lambda *words: compared(*words) + math.inf)
        with pytest.raises(LearningError, match="less what they are compared with"):
            learner.step(1, plan)
        assert all(map(torch.equal, before, masked_model.mask_logits))
        assert learner.tracker.delta == delta
