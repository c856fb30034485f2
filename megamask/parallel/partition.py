"""The assignment of masked layers to the data-parallel replicas that update them."""

from __future__ import annotations

from collections.abc import Sequence

from megamask.errors import ConfigError


def owners(sizes: Sequence[int], replicas: int) -> list[int]:
    """The replica that owns each tensor.

    The tensors are assigned whole, the largest first, each to the replica with the smallest sum of
    sizes so far.

    Args:
        sizes: number of elements of each tensor.
        replicas: number of data-parallel replicas.

    Raises:
        ConfigError: a replica would own nothing.
    """
    if replicas > len(sizes):
        allowed = f"false on more replicas than masked layers, here {replicas} and {len(sizes)}"
        raise ConfigError(
            "learn.optimizer.distributed",
            True,
            allowed,
            "Switch it off, or start fewer replicas (a larger parallel.tp).",
        )
    owner_of, loads = [0] * len(sizes), [0] * replicas
    for number in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        owner_of[number] = loads.index(min(loads))
        loads[owner_of[number]] += sizes[number]
    return owner_of


def largest_share(sizes: Sequence[int], replicas: int) -> float:
    """The largest share of all elements that a replica owns; at least 1 / replicas.

    Raises:
        ConfigError: a replica would own nothing.
    """
    loads = [0] * replicas
    for owner, size in zip(owners(sizes, replicas), sizes, strict=True):
        loads[owner] += size
    return max(loads) / sum(sizes)
