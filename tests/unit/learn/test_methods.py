"""Bytes a weight, against sums done by hand."""

from __future__ import annotations

import pytest

from megamask.config import Config, load_config
from megamask.learn.method import KEPT, MOMENTS, PARTS, STEP_GRADIENTS, StateOf
from megamask.learn.methods import state_bytes
from megamask.sparsity.pattern import Pattern

MASKPRO = ("learn.method=maskpro",)


def total(*overrides: str, accumulations: int = 1) -> float:
    return sum(parts(*overrides, accumulations=accumulations).values())


def parts(*overrides: str, accumulations: int = 1) -> dict[str, float]:
    config: Config = load_config(None, ["learn.method=categorical", *overrides])
    pattern = Pattern.parse(config.pattern)
    return state_bytes(StateOf(pattern, config.learn, accumulations, config.dtype))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], 2 + 6 + 6 + 12 + 0.5 + 2),
        (
            ["learn.state.masked_weight=regenerate", "learn.state.track_flips=false"],
            26.0,
        ),  # AdamW in fp32
        (["learn.memory=lean"], 2 + 3 + 3 + 6 + 0.5),
        (["learn.memory=leanest"], 2 + 3 + 3 + 1.5 * (1 + 1 / 48)),
        (["dtype=fp32"], 4 + 6 + 6 + 12 + 0.5 + 4),
        (["pattern=1:4"], 2 + 4 + 4 + 8 + 0.5 + 2),  # one candidate a weight
        (["pattern=4:8"], 2 + 8.75 * 16 + 0.25 + 2),  # 70 candidates of 8 weights
        (["learn.method=subset"], 2 + 16 + 0.5 + 2),  # one logit a weight
        (["learn.method=subset", "pattern=8:16"], 2 + 16 + 0.25 + 2),  # winners of 16 bits
        (
            [*MASKPRO],
            2 + 4 + 3 * 0.25,
        ),  # no gradients, no moments, nothing kept; m_0 beside two winners
        ([*MASKPRO, "learn.state.track_flips=false", "pattern=8:16"], 2 + 4 + 2 / 16),
        (["learn.method=subset", "learn.memory=leanest"], 2 + 2 + 2 + 1 * (1 + 1 / 32)),
    ],
)
def test_totals(settings: list[str], expected: float) -> None:
    assert total(*settings) == pytest.approx(expected)


def test_every_part_is_named() -> None:
    assert tuple(parts()) == PARTS


def test_leanest_is_what_the_issue_aims_at() -> None:
    assert total("learn.memory=leanest") < 11 and total("learn.memory=lean") < 15


def test_one_draw_a_step_keeps_masked_weights_and_their_gradients() -> None:
    step = "learn.sampling.draws=step"
    assert parts(step)[STEP_GRADIENTS] == 2 and parts(step, accumulations=4)[STEP_GRADIENTS] == 4
    assert parts(step, "learn.state.masked_weight=regenerate")[KEPT] == 2
    assert parts(step, "learn.state.grads=bf16", accumulations=4)[STEP_GRADIENTS] == 2
    assert parts("learn.state.masked_weight=regenerate")[KEPT] == 0 == parts()[STEP_GRADIENTS]


@pytest.mark.parametrize(
    ("kind", "bytes_each"),
    [("adamw", 8), ("adamw8bit", 2 + 8 / 256), ("lion", 2), ("lion8bit", 1 + 1 / 48)],
)
def test_moments(kind: str, bytes_each: float) -> None:
    assert parts(f"learn.optimizer.kind={kind}")[MOMENTS] == pytest.approx(1.5 * bytes_each)
    in_bf16 = 4 if kind == "adamw" else bytes_each
    assert parts(f"learn.optimizer.kind={kind}", "learn.state.logits=bf16")[
        MOMENTS
    ] == pytest.approx(1.5 * in_bf16)
