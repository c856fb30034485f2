"""The arms of the study: every arm is valid, and an ablation varies its own setting alone."""

from __future__ import annotations

import pytest

from megamask.config import Config
from megamask.optim.schedule import learning_rates
from studies.learners import __main__
from studies.learners.arm import Arm
from studies.learners.arms import ARMS, BASE, by_name
from tests.unit.studies.stand_ins import BATCH, SEQ, STEPS, Words


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_arm_is_a_valid_setting(arm: Arm, words: Words) -> None:
    bench = __main__.open_bench(__main__.read_options(words()))
    config = bench.config(arm)
    assert (
        config.pattern == arm.pattern
        and config.data.seq_length == SEQ
        and config.learn.global_batch == BATCH * arm.batch
    )
    assert not arm.learns or config.learn.prior.mask == arm.prior
    assert config.learn.steps == max(1, round(STEPS * arm.share_of_steps))


def test_an_ablation_changes_one_thing(words: Words) -> None:
    """Every ablation holds its reference's own settings as one of its rows, so that the table has
    all values of what is varied.
    """
    bench = __main__.open_bench(__main__.read_options(words(steps=20)))
    base = bench.digest(by_name()[BASE])
    for group in (
        "prior",
        "kappa",
        "tau",
        "alpha",
        "weight-norm",
        "hard",
        "optimizer",
        "momentum",
        "noise",
        "gumbel",
        "margins",
        "distillation",
        "rate",
        "warmup",
        "eps",
    ):
        same = [arm.name for arm in ARMS if arm.group == group and bench.digest(arm) == base]
        assert len(same) == 1, group


def derived_rates(steps: int, batch: int) -> tuple[float, float]:
    learn = {"steps": steps, "global_batch": batch, "prior": {"mask": "sparsegpt"}}
    return learning_rates(Config.model_validate({"data": {"seq_length": SEQ}, "learn": learn}))


@pytest.mark.parametrize("steps", [15, 60, 240])
def test_the_rate_is_the_derived_one_or_a_multiple(words: Words, steps: int) -> None:
    bench = __main__.open_bench(__main__.read_options(words(steps=steps)))
    derived, last = derived_rates(steps, BATCH)
    for arm, share in (
        ("subset-2of4", 1.0),
        ("alpha-1", 1 / 3),  # the rate is proportional to the gap
        ("rate-half", 0.5),
        ("rate-twice", 2.0),
        ("optimizer-lion", 1 / 3),
    ):
        found = learning_rates(bench.config(by_name()[arm]))
        # the words of a command have three digits
        assert found == pytest.approx((share * derived, share * last), rel=5e-3), arm


def test_another_rule_of_the_rate_is_another_run(
    words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = __main__.open_bench(__main__.read_options(words()))
    arm = by_name()[BASE]
    before = bench.digest(arm)
    monkeypatch.setattr("studies.learners.bench.learning_rates", lambda learn: (1.0, 0.1))
    assert bench.digest(arm) != before


@pytest.mark.parametrize("steps", [15, 60, 240])
def test_arms_of_batch_and_rate_have_the_derived_rate(words: Words, steps: int) -> None:
    bench = __main__.open_bench(__main__.read_options(words(steps=steps)))
    for arm in (arm for arm in ARMS if arm.group == "scale"):
        config = bench.config(arm)
        expected = [arm.rate * rate for rate in derived_rates(steps, arm.batch * BATCH)]
        # The words of a command have three digits.
        assert learning_rates(config) == pytest.approx(expected, rel=5e-3), arm.name
        assert config.learn.global_batch == arm.batch * BATCH
    one = bench.config(by_name()["scale-1-one"]).learn
    assert "optimizer" not in one.model_dump(exclude_unset=True)
    assert len({bench.digest(arm) for arm in ARMS if arm.group == "scale"}) == 12
