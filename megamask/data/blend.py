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
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megamask.config import Config, run_paths
from megamask.data.sample_cache import describes_samples, holds_plain_integers
from megamask.data.shards import Part, Shards, open_shards
from megamask.data.split import TRAIN
from megamask.data.tokenizer import TextTokenizer, load_tokenizer
from megamask.errors import ArtifactError, ConfigError
from megamask.storage import atomic_dir

log = logging.getLogger(__name__)


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
        ConfigError: as ``check_blend``; or no domain is left to learn from.
    """
    domains, given = config.data.domains, check_blend(config)
    total = sum(given.values())
    if total <= 0 and not config.data.blend:
        shares = {name: corpus.heldout for name, corpus in domains.items()}
        fix = "Lower heldout of a domain to learn from, or add such a domain."
        raise ConfigError("data.domains", shares, "a domain with heldout below 1", fix)
    if total <= 0:
        raise ConfigError(
            "data.blend",
            given,
            "at least one weight above 0",
            "Give the domains to learn from a positive weight.",
        )
    return {name: given[name] / total for name in domains if given.get(name, 0) > 0}


def check_blend(config: Config) -> dict[str, float]:
    """The weights of ``data.blend``, or those that stand for it, checked one by one.

    Raises:
        ConfigError: a weight is negative or not finite, a domain is unknown, or a domain to learn
            from has only held-out text.
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
    return given


class Samples:
    """Training samples, each checked against the note of the shards when it is read.

    ``samples[i]`` has int64 ``tokens`` and ``labels`` (S,).

    Args:
        dataset: Megatron's dataset, of one source or blended.
        owners: the shards of each of its sources, in their order.
    """

    def __init__(self, dataset: Any, owners: list[Shards]) -> None:
        self._dataset, self._owners = dataset, owners

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Sample ``number``.

        Raises:
            ArtifactError: the sample holds a token id that its shards were not written with.
        """
        sample: dict[str, Any] = self._dataset[number]
        owner = self._owners[int(sample.get("dataset_id", 0))]  # of a blended dataset alone
        for row in (sample["tokens"], sample["labels"]):
            smallest, largest = row.aminmax()
            owner.check_ids(TRAIN, int(smallest), int(largest))
        return sample


def train_dataset(config: Config, num_samples: int, seq_length: int, seed: int) -> Samples:
    """At least ``num_samples`` training samples, in the order fixed by (config, seed).

    A domain that is shorter than its part of the blend is read again in another order. Where
    torch.distributed runs, every rank must call this function: rank 0 writes the index cache
    (``shards/cache``) and the other ranks wait for it.

    Raises:
        ConfigError: see :func:`blend_weights`.
        ArtifactError: see :func:`megamask.data.shards.open_shards`; a broken index of tokens, or
            indices of samples that do not describe the documents.
    """
    weights, tokenizer = blend_weights(config), load_tokenizer(config)
    shards = {name: open_shards(config, name, TRAIN, tokenizer) for name in weights}
    of_domains = {name: _sources(shards[name], weight) for name, weight in weights.items()}
    sources = [source for found in of_domains.values() for source in found]
    sized = [(part, math.ceil(num_samples * weight) + 1) for part, weight in sources]
    settings = _dataset_config(sources, tokenizer, seq_length, seed)
    cache = run_paths(config).shards / "cache" / _cache_key(shards, sized, settings)

    # Rank 0 builds the index cache, then every rank reads it.
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    datasets: list[Any] | None = None
    if not distributed or torch.distributed.get_rank() == 0:
        datasets = _cached_datasets(sized, settings, cache)
        if datasets is None:
            with atomic_dir(cache) as temporary:
                _build_cache(sized, settings, temporary, cache)
    if distributed:
        torch.distributed.barrier()
    datasets = datasets or _domain_datasets(sized, settings, cache)
    blended = (
        datasets[0]
        if len(datasets) == 1
        else _blended(datasets, [weight for _, weight in sources], num_samples, settings)
    )
    return Samples(blended, [shards[name] for name, found in of_domains.items() for _ in found])


def _sources(shards: Shards, weight: float) -> list[tuple[Part, float]]:
    """The parts of a domain, each with its share of the weight by tokens."""
    parts = [part for part in shards.parts(TRAIN) if part.tokens]
    if len(parts) == 1:
        return [(parts[0], weight)]
    total = sum(part.tokens for part in parts)
    return [(part, weight * part.tokens / total) for part in parts]


def _dataset_config(
    sources: list[tuple[Part, float]], tokenizer: TextTokenizer, seq_length: int, seed: int
) -> Any:
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    eod = tokenizer.eod if tokenizer.eod is not None else -1
    prefixes = [str(part.index.prefix) for part, _ in sources]
    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=[(prefixes, [weight for _, weight in sources]), None, None],
        tokenizer=_DatasetTokenizer(tokenizer.fingerprint, tokenizer.vocab_size, eod),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )


def _cache_key(shards: dict[str, Shards], sized: list[tuple[Part, int]], settings: Any) -> str:
    """Name of the cache folder: a hash over the paths and the content of the shards.

    Megatron's own cache key covers the paths only, so rewritten shards would find a stale cache.
    """
    deciding = [
        [[str(part.index.prefix), size] for part, size in sized],
        [shard.digests(TRAIN) for shard in shards.values()],
        settings.random_seed,
        settings.sequence_length,
        settings.tokenizer.fingerprint,
    ]
    return hashlib.sha256(json.dumps(deciding).encode()).hexdigest()[:16]


def _cached_datasets(sized: list[tuple[Part, int]], settings: Any, cache: Path) -> list[Any] | None:
    """The datasets with the indices of a cache; None where there is no cache, or a broken cache,
    which the log names.
    """
    if not cache.is_dir():
        return None
    if holds_plain_integers(_cache_folders(sized, cache)):
        datasets = _domain_datasets(sized, settings, cache)
        if all(describes_samples(dataset) for dataset in datasets):
            return datasets
    log.warning("%s does not describe the samples of the shards: built again", cache)
    return None


def _build_cache(sized: list[tuple[Part, int]], settings: Any, folder: Path, cache: Path) -> None:
    """Write the indices of samples into ``folder``, which becomes ``cache``.

    Raises:
        ArtifactError: Megatron's indices do not describe samples of the documents.
    """
    if not all(map(describes_samples, _domain_datasets(sized, settings, folder))):
        problem = "would not describe the samples of the shards"
        raise ArtifactError(cache, problem, "Run the verb tokenize again, then this command.")


def _cache_folders(sized: list[tuple[Part, int]], cache: Path) -> list[Path]:
    """The folder of the indices of each part.

    Megatron names the files by path and number of samples, and not by documents. So a part whose
    path and number are those of an earlier part, as of two domains that split one dataset in two
    ways, has a folder of its own.
    """
    before, folders = Counter[tuple[str, int]](), []
    for part, size in sized:
        name = (str(part.index.prefix), size)
        folders.append(cache / str(before[name]) if before[name] else cache)
        before[name] += 1
    return folders


def _domain_datasets(sized: list[tuple[Part, int]], settings: Any, cache: Path) -> list[Any]:
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.utils import Split

    datasets: list[Any] = []
    for (part, size), folder in zip(sized, _cache_folders(sized, cache), strict=True):
        settings = dataclasses.replace(settings, path_to_cache=str(folder))
        prefix = str(part.index.prefix)
        indexed = GPTDataset.build_low_level_dataset(prefix, settings)
        datasets.append(GPTDataset(indexed, prefix, part.sequences, size, Split.train, settings))
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
