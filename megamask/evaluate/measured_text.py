"""The text that a perplexity is measured on, and what a reader must know of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megamask.config import Config
from megamask.data.bos import description
from megamask.data.heldout import evaluated_domains, evaluation_windows
from megamask.data.shards import Shards, read_shards
from megamask.data.split import TRAIN
from megamask.data.tokenizer import load_tokenizer
from megamask.data.wikitext import NAME, wikitext
from megamask.masks.file import MaskSet
from megamask.prepare.run_inputs import RunInputs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MeasuredText:
    """The tokens of a protocol.

    Attributes:
        windows: domain -> tokens (N windows, S sequence).
        facts: of the protocol, in the order of the printed line.
    """

    windows: dict[str, torch.Tensor]
    facts: dict[str, object]


def measured_text(inputs: RunInputs) -> MeasuredText:
    """The text of ``evaluate.protocol``, whose token ids the model knows.

    Raises:
        ConfigError, ArtifactError: the text is missing, unreadable, or too short for one window.
    """
    config = inputs.config
    if not config.evaluate.is_published:
        inputs.check_text()
        windows = evaluation_windows(config, config.evaluate.max_tokens)
        bos = description(config, load_tokenizer(config))
        return MeasuredText(windows, _facts(config, windows, bos, {"split": "held-out documents"}))
    found = wikitext(config, config.evaluate.protocol_window, inputs.arch.vocab)
    windows = {NAME: found.windows_NS}
    text = {"split": "test", "text": found.source, "text_sha256": found.sha256}
    bos = "one at the start of the text" if found.has_bos else "none"
    return MeasuredText(windows, _facts(config, windows, bos, text))


def warn_of_learned_text(inputs: RunInputs, masks: Mapping[str, MaskSet]) -> None:
    """Warn of masks that were made from other training text than the shards hold now: documents
    that are held out today may be among it. Mask files of before do not name their text.

    Raises:
        ArtifactError: shards are missing or torn.
    """
    config, folder = inputs.config, inputs.paths.shards
    for domain in () if config.evaluate.is_published else evaluated_domains(config):
        shards = read_shards(folder / domain)
        for name, found in masks.items():
            if not _was_made_from(found.meta, domain, shards):
                said = "%s was made from other text of %s than %s holds now: documents that are "
                said += "held out may be among it"
                log.warning(said, name, domain, shards.folder)


def _was_made_from(meta: Mapping[str, Any], domain: str, shards: Shards) -> bool:
    """Whether the header of a mask file names the training text of the shards, or none."""
    learned = _inner(meta, "data", "text_sha256", domain)
    calibrated = _inner(meta, "data", "calibration", "shards_sha256", domain)
    is_learned = learned in (None, shards.content_sha256(TRAIN))
    return is_learned and calibrated in (None, shards.digests(TRAIN))


def _inner(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _facts(
    config: Config, windows: dict[str, torch.Tensor], bos: str, text: dict[str, str]
) -> dict[str, object]:
    section, tokenizer = config.evaluate, load_tokenizer(config)
    window = section.protocol_window
    return {
        "name": section.protocol,
        "window": window,
        "stride": window,
        "targets_per_window": window - 1,
        "tail": "dropped",
        "bos": bos,
        "dtype": config.dtype,
        "tokenizer": Path(tokenizer.name).name,
        "tokenizer_sha256": tokenizer.fingerprint,
        **text,
        "windows": {domain: len(tokens) for domain, tokens in windows.items()},
        "tokens": {domain: tokens.numel() for domain, tokens in windows.items()},
    }
