"""The text that a perplexity is measured on, and what a reader must know of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megamask.config import Config
from megamask.data.bos import description
from megamask.data.heldout import evaluation_windows
from megamask.data.tokenizer import load_tokenizer
from megamask.data.wikitext import NAME, wikitext
from megamask.prepare.run_inputs import RunInputs


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
        inputs.check_vocabulary()
        windows = evaluation_windows(config, config.evaluate.max_tokens)
        bos = description(config, load_tokenizer(config))
        return MeasuredText(windows, _facts(config, windows, bos, {"split": "held-out documents"}))
    found = wikitext(config, config.evaluate.protocol_window, inputs.arch.vocab)
    windows = {NAME: found.windows_NS}
    text = {"split": "test", "text": found.source, "text_sha256": found.sha256}
    bos = "one at the start of the text" if found.has_bos else "none"
    return MeasuredText(windows, _facts(config, windows, bos, text))


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
