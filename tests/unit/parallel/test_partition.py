"""Layers are assigned whole and evenly, and in the same way on every replica."""

from __future__ import annotations

import pytest

from megamask.errors import ConfigError
from megamask.parallel.partition import largest_share, owners


def loads(sizes: list[int], replicas: int) -> list[int]:
    found = owners(sizes, replicas)
    return [
        sum(size for size, owner in zip(sizes, found, strict=True) if owner == replica)
        for replica in range(replicas)
    ]


def test_the_largest_first() -> None:
    # 8 goes to replica 0, 5 and 3 to replica 1, and 1 to the first of two equal sums.
    assert owners([1, 8, 3, 5], 2) == [0, 0, 1, 1]
    assert loads([1, 8, 3, 5], 2) == [9, 8]
    assert largest_share([1, 8, 3, 5], 2) == 9 / 17
    assert largest_share([1, 8, 3, 5], 1) == 1


@pytest.mark.parametrize("replicas", [2, 3, 8, 16, 100])
def test_nobody_is_far_above_the_mean(replicas: int) -> None:
    sizes = [3, 1, 5, 2] * 32  # the proportions of the linears of a layer
    # The bound of the rule "largest first" for any list of sizes.
    assert max(loads(sizes, replicas)) <= sum(sizes) / replicas + max(sizes)
    assert min(loads(sizes, replicas)) > 0


def test_a_replica_without_a_layer_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match="learn.optimizer.distributed = True: "
        "false on more replicas than masked layers, here 4 and 3",
    ):
        owners([1, 1, 1], 4)
