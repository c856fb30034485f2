"""Who of the data-parallel replicas updates which layer."""

from __future__ import annotations

from collections.abc import Sequence

from megamask.errors import ConfigError


def owners(sizes: Sequence[int], replicas: int) -> list[int]:
    """The replica that owns each of the tensors of ``sizes``, whole: the largest first, each to the
    one that has least so far.

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
    found, loads = [0] * len(sizes), [0] * replicas
    for number in sorted(range(len(sizes)), key=lambda one: -sizes[one]):
        found[number] = loads.index(min(loads))
        loads[found[number]] += sizes[number]
    return found


def largest_share(sizes: Sequence[int], replicas: int) -> float:
    """The share of all ``sizes`` that the replica with the most owns; a little over 1 / replicas.
    Raises as ``owners``.
    """
    loads = [0] * replicas
    for owner, size in zip(owners(sizes, replicas), sizes, strict=True):
        loads[owner] += size
    return max(loads) / sum(sizes)
