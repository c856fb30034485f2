"""One mask for several micro-batches of a step: its gradient, against a draw for each of them from
the same key.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megamask.config.load import load_config
from megamask.learn import gumbel
from megamask.learn.gumbel import GradientLearner, GradientResult
from tests.unit.learn.one_rank import tiny_config, tiny_masked_model, tiny_plan

MICRO_BATCHES = 4
# A product of dW and weight is a sum of 4 terms a group in fp32, over 4 micro-batches, in another
# order: 16 roundings of 2^-24 of terms that cancel in part.
TOLERANCE = 1e-5


def one_step(draws: str | int) -> tuple[GradientResult, list[torch.Tensor]]:
    """What the first step measured, and the gradients at the logits of every layer."""
    sampling = {"backend": "numba", "draws": draws, "noise": 1.0}
    learn: dict[str, Any] = {"micro_batch": 1, "global_batch": MICRO_BATCHES, "sampling": sampling}
    config = tiny_config(learn)
    with tiny_masked_model(config) as (mesh, masked_model):
        learner = GradientLearner(config, mesh, masked_model)
        result = learner.step(0, tiny_plan(config, mesh))
        logits: list[Any] = list(masked_model.mask_logits)
        return result, [one.main_grad.clone() for one in logits]


def is_near(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(
        float((one - other).abs().max()) < TOLERANCE * float(other.abs().max())
        for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("span", [1, 2, 3])
def test_a_shared_mask_has_the_gradient_of_a_draw_for_each(
    span: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, found = one_step(span)
    alone, fresh = one_step("micro_batch")

    def with_shared_number(one: Any, **changes: Any) -> Any:
        if "micro_batch" in changes:
            changes["micro_batch"] -= changes["micro_batch"] % span
        return dataclasses.replace(one, **changes)

    monkeypatch.setattr(gumbel, "replace", with_shared_number)
    expected_result, expected = one_step("micro_batch")
    assert is_near(found, expected)
    assert is_near(found, fresh) == (span == 1)
    assert result.lm_loss == pytest.approx(expected_result.lm_loss, rel=1e-6)
    assert result.weight_norm == pytest.approx(expected_result.weight_norm, rel=1e-9)
    assert (result.lm_loss == alone.lm_loss) == (span == 1)
    for number, one in expected_result.first_draw.items():  # which counts flips
        assert torch.equal(result.first_draw[number].hard_codes, one.hard_codes)
        assert float(result.first_draw[number].largest) > 0


@pytest.mark.parametrize("span", [MICRO_BATCHES, MICRO_BATCHES + 3])
def test_a_mask_for_all_micro_batches_is_that_of_the_step(span: int) -> None:
    whole, expected = one_step("step")
    result, found = one_step(span)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert result.lm_loss == whole.lm_loss and result.grad_norm == whole.grad_norm


@pytest.mark.parametrize(
    ("draws", "replicas", "replica", "uses"),
    [
        ("micro_batch", 1, 0, [1, 1, 1, 1]),
        ("step", 2, 1, [4]),
        (1, 1, 0, [1, 1, 1, 1]),
        (3, 1, 0, [3, 1]),
        (4, 2, 0, [2, 2]),  # 0 2 | 4 6
        (3, 2, 0, [2, 1, 1]),  # 0 2 | 4 | 6
        (3, 2, 1, [1, 2, 1]),  # 1 | 3 5 | 7
        (2, 4, 3, [1, 1, 1, 1]),
        (10**6, 4, 3, [4]),
    ],
)
def test_how_many_micro_batches_of_a_replica_share(
    draws: str | int, replicas: int, replica: int, uses: list[int]
) -> None:
    sampling = load_config(None, [f"learn.sampling.draws={draws}"]).learn.sampling
    assert sampling.uses(4, replicas, replica) == uses
