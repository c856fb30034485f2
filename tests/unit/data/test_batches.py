"""The same global batch, in the same numbered micro-batches, however it is split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megamask.config import Config
from megamask.data.batches import BatchPlan, check_batch
from megamask.data.blend import train_dataset
from megamask.errors import ConfigError
from megamask.verbs import tokenize


@pytest.fixture
def dataset(two_domains: Callable[..., Config]) -> Any:
    config = two_domains()
    tokenize.run(config)
    return train_dataset(config, 48, 16, seed=1)


def step_by_number(
    dataset: Any, step: int, micro_batch: int, replicas: int
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    signs: list[None] = []
    for replica in range(replicas):
        signs.clear()
        plan = BatchPlan(dataset, 12, micro_batch, replicas, replica, lambda: signs.append(None))
        batches = list(plan.micro_batches(step))
        assert len(signs) == len(batches) == plan.accumulations == 12 // (micro_batch * replicas)
        assert [number for number, _, _ in batches] == [
            a * replicas + replica for a in range(plan.accumulations)
        ]
        found |= {number: (tokens, labels) for number, tokens, labels in batches}
    return found


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_any_number_of_replicas_gives_the_same_micro_batches(
    dataset: Any, step: int, micro_batch: int
) -> None:
    whole_BS = torch.stack([dataset[step * 12 + index]["tokens"] for index in range(12)])
    labels_BS = torch.stack([dataset[step * 12 + index]["labels"] for index in range(12)])
    for replicas in (1, 2, 4):
        if 12 % (micro_batch * replicas):
            continue
        found = step_by_number(dataset, step, micro_batch, replicas)
        assert sorted(found) == list(range(12 // micro_batch))
        assert torch.equal(torch.cat([found[number][0] for number in sorted(found)]), whole_BS)
        assert torch.equal(torch.cat([found[number][1] for number in sorted(found)]), labels_BS)
        assert (
            not torch.equal(
                torch.cat([found[number][0] for number in sorted(found, reverse=True)]), whole_BS
            )
            or len(found) == 1
        )


@pytest.mark.parametrize(
    ("sizes", "nearest"), [((10, 4, 2), "8 or 16"), ((3, 4, 2), "to 8"), ((9, 4, 1), "8 or 12")]
)
def test_a_batch_that_cannot_be_dealt_out(sizes: tuple[int, int, int], nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"learn\.global_batch.*learn\.micro_batch.*{nearest}"):
        check_batch(*sizes)
    with pytest.raises(ConfigError, match=r"learn\.global_batch"):
        BatchPlan(None, *sizes, replica=0)
    check_batch(8, 4, 2)
