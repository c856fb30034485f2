"""What counts in the hash of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamask.config import Config
from megamask.storage import read_json, write_json
from studies import given
from studies.given import LEARNING, MAKING, deciding

ALL = (*MAKING, *LEARNING)


def config(**learn: object) -> Config:
    return Config.model_validate({"learn": learn})


def test_a_given_default_is_no_other_run() -> None:
    kept = deciding(Config(), ALL)
    assert kept == deciding(config(steps=Config().learn.steps), ALL)
    assert deciding(config(steps=70), ALL) == {**kept, "learn.steps": 70}
    assert deciding(config(steps=70), MAKING) == kept


def test_the_decay_rates_that_follow_from_a_run_count() -> None:
    """As those that are given, and only where they are not those of before."""
    rates = {"learn.optimizer.betas": [0.7, 0.95]}
    assert deciding(config(steps=20), ALL) == {"learn.steps": 20, **rates}
    given = config(steps=20, optimizer={"betas": (0.7, 0.95)})
    assert deciding(given, ALL) == deciding(config(steps=20), ALL)
    assert deciding(config(steps=20, optimizer={"betas": (0.9, 0.95)}), ALL) == {"learn.steps": 20}


def test_what_does_not_decide_counts_for_nothing() -> None:
    free = {"monitor": {"evaluate_every": 3}, "snapshot": {"every": 9}, "resume": False}
    assert deciding(config(**free), ALL) == deciding(Config(), ALL)
    # masks with noise are drawn for each micro-batch
    assert deciding(config(micro_batch=1), ALL) != deciding(Config(), ALL)


def test_a_default_that_changes_is_another_run_and_a_new_setting_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, known = deciding(Config(), ALL), read_json(given.DEFAULTS, "")
    other = tmp_path / "defaults.json"
    monkeypatch.setattr(given, "DEFAULTS", other)
    write_json(other, known | {"learn.sampling.noise": 1.0})
    assert deciding(Config(), ALL) == before | {"learn.sampling.noise": 0.0}
    write_json(other, {key: value for key, value in known.items() if "noise" not in key})
    assert deciding(Config(), ALL) == before
