"""Training samples: Megatron's GPTDataset over the training shards of each domain, blended by
weight.

Shapes: S sequence.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megamask.config import Config, run_paths
from megamask.data.shards import Shards, open_shards
from megamask.data.split import TRAIN
from megamask.data.tokenizer import TextTokenizer, load_tokenizer
from megamask.errors import ConfigError
from megamask.storage import atomic_dir


@dataclasses.dataclass(frozen=True)
class _DatasetTokenizer:
    """The attributes that GPTDataset reads from a tokenizer.

    GPTDataset rewrites pad tokens, so the pad id is a number that no shard holds.
    """

    fingerprint: str
    vocab_size: int
    eod: int
    pad: int = -1

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """The tokenizer's part of GPTDataset's cache key."""
        return {"fingerprint": self.fingerprint}


def blend_weights(config: Config) -> dict[str, float]:
    """Domain -> weight, positive and summing to one, in the order of ``data.domains``.

    ``data.blend`` names the domains to learn from; a domain that it leaves out, or weighs 0, serves
    evaluation alone. Without ``data.blend``, all domains that have training text get the same
    weight.

    Raises:
        ConfigError: a weight is negative or not finite, the weights sum to zero, a domain is
            unknown, or a domain to learn from has only held-out text.
    """
    domains, given = config.data.domains, dict(config.data.blend)
    given = given or {name: float(corpus.heldout < 1) for name, corpus in domains.items()}
    for name, weight in given.items():
        if name not in domains:
            raise ConfigError(
                f"data.blend.{name}",
                weight,
                f"a domain of data.domains: {', '.join(domains)}",
                "Correct the name or add it.",
            )
        if not (weight >= 0 and math.isfinite(weight)):
            raise ConfigError(
                f"data.blend.{name}",
                weight,
                "a finite weight of 0 or more",
                "Correct it; 0 keeps the domain for evaluation.",
            )
        if weight > 0 and domains[name].heldout == 1:
            raise ConfigError(
                f"data.blend.{name}",
                weight,
                f"0, for data.domains.{name}.heldout=1 leaves no text to learn from",
                "Leave the domain out of data.blend, or lower its heldout.",
            )
    total = sum(given.values())
    if total <= 0:
        raise ConfigError(
            "data.blend",
            given,
            "at least one weight above 0",
            "Give the domains to learn from a positive weight.",
        )
    return {name: given[name] / total for name in domains if given.get(name, 0) > 0}


def train_dataset(config: Config, num_samples: int, seq_length: int, seed: int) -> Any:
    """At least ``num_samples`` training samples, in the order fixed by (config, seed).

    ``dataset[i]`` has int64 ``tokens`` and ``labels`` (S,). A domain that is shorter than its part
    of the blend is read again in another order. Where torch.distributed runs, every rank must call
    this function: rank 0 writes the index cache (``shards/cache``) and the other ranks wait for it.

    Raises:
        ConfigError: see :func:`blend_weights`.
        ArtifactError: see :func:`megamask.data.shards.open_shards`.
    """
    weights, tokenizer = blend_weights(config), load_tokenizer(config)
    shards = {name: open_shards(config, name, TRAIN, tokenizer) for name in weights}
    # The blend takes up to one sample more than the exact part of a domain.
    sizes = {name: math.ceil(num_samples * weight) + 1 for name, weight in weights.items()}
    settings = _dataset_config(shards, weights, tokenizer, seq_length, seed)
    cache = run_paths(config).shards / "cache" / _cache_key(shards, sizes, settings)

    # Rank 0 builds the index cache, then every rank reads it.
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if (not distributed or torch.distributed.get_rank() == 0) and not cache.is_dir():
        with atomic_dir(cache) as temporary:
            _domain_datasets(shards, sizes, settings, temporary)
    if distributed:
        torch.distributed.barrier()
    parts = _domain_datasets(shards, sizes, settings, cache)
    return (
        parts[0]
        if len(parts) == 1
        else _blended(parts, list(weights.values()), num_samples, settings)
    )


def _dataset_config(
    shards: dict[str, Shards],
    weights: dict[str, float],
    tokenizer: TextTokenizer,
    seq_length: int,
    seed: int,
) -> Any:
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    eod = tokenizer.eod if tokenizer.eod is not None else -1
    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=[
            ([shard.prefix(TRAIN) for shard in shards.values()], list(weights.values())),
            None,
            None,
        ],
        tokenizer=_DatasetTokenizer(tokenizer.fingerprint, tokenizer.vocab_size, eod),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )


def _cache_key(shards: dict[str, Shards], sizes: dict[str, int], settings: Any) -> str:
    """Name of the cache folder: a hash over the paths and the content of the shards.

    Megatron's own cache key covers the paths only, so rewritten shards would find a stale cache.
    """
    content = [
        [shard.prefix(TRAIN), shard.digests(TRAIN), sizes[name]] for name, shard in shards.items()
    ]
    deciding = [
        content,
        settings.random_seed,
        settings.sequence_length,
        settings.tokenizer.fingerprint,
    ]
    return hashlib.sha256(json.dumps(deciding).encode()).hexdigest()[:16]


def _domain_datasets(
    shards: dict[str, Shards], sizes: dict[str, int], settings: Any, cache: Path
) -> list[Any]:
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.utils import Split

    settings = dataclasses.replace(settings, path_to_cache=str(cache))
    datasets: list[Any] = []
    for name, shard in shards.items():
        indexed = GPTDataset.build_low_level_dataset(shard.prefix(TRAIN), settings)
        documents = np.arange(GPTDataset.numel_low_level_dataset(indexed), dtype=np.int32)
        datasets.append(
            GPTDataset(indexed, shard.prefix(TRAIN), documents, sizes[name], Split.train, settings)
        )
    return datasets


def _blended(parts: list[Any], weights: list[float], num_samples: int, settings: Any) -> Any:
    """Interleave the datasets of the domains by weight.

    The interleaving has no cache: it is quick, and Megatron caches it only where torch.distributed
    runs.
    """
    from megatron.core.datasets.blended_dataset import BlendedDataset

    with _without_warnings("megatron.core.datasets.blended_dataset"):
        return BlendedDataset(parts, weights, num_samples, settings)


@contextmanager
def _without_warnings(logger_name: str) -> Iterator[None]:
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
