"""The dataset under torch.distributed: rank 0 writes the cache, every rank reads the same samples
as one process alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from megamask.config import Config, run_paths
from megamask.data.blend import train_dataset
from megamask.verbs import tokenize
from tests.parallel.ranks import run_ranks


def read(rank: int, config: Config) -> torch.Tensor:
    dist.init_process_group("gloo")
    tokens = tokens_of(config)
    dist.destroy_process_group()
    return tokens


def tokens_of(config: Config) -> torch.Tensor:
    """The first 30 samples."""
    dataset = train_dataset(config, 30, 16, seed=1)
    return torch.stack([dataset[index]["tokens"] for index in range(30)])


def test_two_ranks_read_what_one_process_reads(
    two_domains: Callable[..., Config],
) -> None:
    config = two_domains()
    tokenize.run(config)
    alone = tokens_of(config)
    caches = list((run_paths(config).shards / "cache").rglob("*.npy"))
    for cache in caches:  # cut off: rank 0 builds them again, before any other rank reads them
        cache.write_bytes(cache.read_bytes()[:100])
    by_rank = run_ranks(read, 2, config)
    assert all(torch.equal(tokens, alone) for tokens in by_rank)
    assert len(caches) == 6 and all(cache.stat().st_size > 100 for cache in caches)
