"""Fixed sets of tokens: held-out windows for perplexity, and calibration samples for the one-shot
criteria.

Shapes: N windows, S sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megamask.config import Config, run_paths
from megamask.data.blend import blend_weights, train_dataset
from megamask.data.bos import before_document, begun, cut_windows, in_windows
from megamask.data.shards import open_shards, read_shards
from megamask.data.split import HELDOUT, TRAIN
from megamask.data.tokenizer import TextTokenizer, load_tokenizer
from megamask.errors import ArtifactError, ConfigError


def evaluated_domains(config: Config) -> list[str]:
    """The domains to evaluate, in the order of ``data.domains``: those with held-out documents.

    A domain with ``heldout: 0`` is learned from and never evaluated.

    Raises:
        ConfigError: no domain holds out documents.
    """
    shares = {name: corpus.heldout for name, corpus in config.data.domains.items()}
    if not any(shares.values()):
        raise ConfigError(
            "data.domains",
            {name: {"heldout": share} for name, share in shares.items()},
            "at least one domain with a heldout above 0: evaluation needs held-out documents",
            "Set data.domains.NAME.heldout=0.05 for one of them, or add a domain with heldout=1 "
            "that is evaluated only, and run the verb tokenize.",
        )
    return [name for name, share in shares.items() if share > 0]


def heldout_digests(config: Config) -> dict[str, str]:
    """The digest of the held-out tokens of every domain that is evaluated, by domain.

    Raises:
        ConfigError, ArtifactError: see :func:`evaluated_domains` and
            :func:`megamask.data.shards.read_shards`.
    """
    folder = run_paths(config).shards
    return {
        domain: read_shards(folder / domain).content_sha256(HELDOUT)
        for domain in evaluated_domains(config)
    }


def evaluation_windows(config: Config, max_tokens: int | None) -> dict[str, Tensor]:
    """The windows of ``evaluate.window`` tokens of every domain that is evaluated, by domain.

    Raises:
        ConfigError, ArtifactError: see :func:`evaluated_domains` and :func:`heldout_windows`.
    """
    window, tokenizer = config.evaluate.window, load_tokenizer(config)
    return {
        domain: heldout_windows(config, domain, window, max_tokens, tokenizer)
        for domain in evaluated_domains(config)
    }


def heldout_windows(
    config: Config,
    domain: str,
    window: int,
    max_tokens: int | None,
    tokenizer: TextTokenizer | None = None,
) -> Tensor:
    """The held-out stream of a domain in non-overlapping windows: int64 (N, window).

    The stream holds the documents as stored, each with an EOD after it; ``evaluate.bos`` says
    where a BOS is added (:mod:`megamask.data.bos`). The windows hold at most ``max_tokens`` tokens.
    A tail that is shorter than a window is dropped. Without ``tokenizer``, the tokenizer of the
    configuration is loaded.

    Raises:
        ConfigError: the domain is unknown, ``evaluate.bos`` is set for a tokenizer without a BOS,
            or ``max_tokens`` is below one window.
        ArtifactError: see :func:`megamask.data.shards.open_shards`; or the text is too short for
            one window.
    """
    tokenizer = tokenizer or load_tokenizer(config)
    shards = open_shards(config, domain, HELDOUT, tokenizer)
    if max_tokens is not None and max_tokens < window:
        raise ConfigError(
            "evaluate.max_tokens",
            max_tokens,
            f"at least one window of {window} tokens",
            "Raise it, or lower evaluate.window.",
        )
    stream = shards.stream(HELDOUT, max_tokens)
    place = in_windows(config, tokenizer)
    windows = cut_windows(stream, window, place, tokenizer.bos, max_tokens)
    if not len(windows):
        fix = (
            f"Lower evaluate.window, or raise data.domains.{domain}.heldout (or its text) "
            "and run the verb tokenize."
        )
        raise ArtifactError(
            shards.folder,
            f"has {len(stream)} held-out tokens, too few for one window of {window}",
            fix,
        )
    return torch.from_numpy(windows)


def calibration_tokens(config: Config) -> Tensor:
    """The calibration samples, int64 (samples, S), taken from the training blend with
    ``calibration.seed``. Each begins with a BOS where documents do.

    Where torch.distributed runs, every rank must call this function.

    Raises:
        ConfigError, ArtifactError: see :func:`megamask.data.blend.train_dataset`.
    """
    section = config.calibration
    dataset = train_dataset(config, section.samples, section.seq_length, section.seed)
    begin = before_document(config, load_tokenizer(config))
    return torch.stack([begun(dataset[index]["tokens"], begin) for index in range(section.samples)])


def calibration_description(config: Config) -> dict[str, Any]:
    """The record of the calibration samples: their settings, blend and SHA-256 of the shards."""
    weights, tokenizer = blend_weights(config), load_tokenizer(config)
    section = config.calibration
    described: dict[str, Any] = {
        "samples": section.samples,
        "seq_length": section.seq_length,
        "seed": section.seed,
        "blend": weights,
        "shards_sha256": {
            name: open_shards(config, name, TRAIN, tokenizer).digests(TRAIN) for name in weights
        },
        "tokenizer": tokenizer.fingerprint,
    }
    if list(weights) != sorted(weights):  # the order decides which samples are drawn
        described["order"] = list(weights)  # masks of before do not say it
    if before_document(config, tokenizer):
        described["bos"] = tokenizer.bos
    return described
