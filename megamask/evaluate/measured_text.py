"""The text that a perplexity is measured on, and what a reader must know of it."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from megamask.config import Config
from megamask.data.bos import description
from megamask.data.heldout import evaluation_windows
from megamask.data.published_text import PROTOCOLS, corpus_of, published_text
from megamask.data.shared_text import learned_domains_with
from megamask.data.tokenizer import load_tokenizer
from megamask.data.windows import NO_TARGET, Windows
from megamask.errors import ConfigError
from megamask.prepare.run_inputs import RunInputs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MeasuredText:
    """The tokens of a protocol.

    Attributes:
        windows: domain -> its windows.
        facts: of the protocol, in the order of the printed line.
        compared: domain -> how many windows, from the first on, are compared with the dense model.
    """

    windows: dict[str, Windows]
    facts: dict[str, object]
    compared: dict[str, int]


def measured_text(inputs: RunInputs) -> MeasuredText:
    """The text of ``evaluate.protocol``, whose token ids the model knows.

    Raises:
        ConfigError, ArtifactError: the text is missing, unreadable, or too short for one window.
    """
    config = inputs.config
    window = config.evaluate.protocol_window
    if not config.evaluate.is_published:
        if config.evaluate.text is not None:
            allowed = "null with held-out text: it names the text of a published protocol"
            fix = "Set evaluate.protocol, for example wikitext2-2048, or leave evaluate.text out."
            raise ConfigError("evaluate.text", config.evaluate.text, allowed, fix)
        inputs.check_text()
        found = evaluation_windows(config, config.evaluate.max_tokens)
        windows = {domain: Windows.inside(tokens) for domain, tokens in found.items()}
        facts = {
            "targets_per_window": window - 1,
            "tail": "dropped",
            "bos": description(config, load_tokenizer(config)),
        }
        split: dict[str, object] = {"split": "held-out documents"}
        return _measured(config, windows, facts, split | {"text_sha256": _digest(windows)})
    protocol = PROTOCOLS[config.evaluate.protocol]
    text = published_text(config, window, inputs.arch.vocab)
    asked = corpus_of(protocol.source, config.evaluate.text)
    for domain, shared in learned_domains_with(asked, config.data.domains):
        said = "%s is measured, and data.domains.%s learns from it: the numbers are no result"
        log.warning(said, shared, domain)
    windows = {protocol.source.name: text.windows}
    facts = {
        "targets_per_window": int((text.windows.labels_NS[0] != NO_TARGET).sum()),
        "tail": protocol.tail,
        "bos": "one at the start of the text" if text.has_bos else "none",
    }
    about = {
        "split": protocol.source.hub.split,
        "text": text.source,
        "documents": text.documents,
        "text_sha256": text.sha256,
    }
    return _measured(config, windows, facts, about)


def _digest(windows: dict[str, Windows]) -> str:
    """The SHA-256 of the tokens of all windows, with the names of their domains."""
    digest = hashlib.sha256()
    for domain, each in windows.items():
        digest.update(f"{domain} {tuple(each.tokens_NS.shape)} ".encode())
        digest.update(each.tokens_NS.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _measured(
    config: Config,
    windows: dict[str, Windows],
    facts: dict[str, object],
    text: dict[str, object],
) -> MeasuredText:
    section, tokenizer = config.evaluate, load_tokenizer(config)
    window = section.protocol_window
    limit = section.compare_tokens
    compared = {
        domain: len(each) if limit is None else min(len(each), -(-limit // window))
        for domain, each in windows.items()
    }
    said: dict[str, object] = {
        "name": section.protocol,
        "window": window,
        "stride": window,
        **facts,
        "dtype": config.dtype,
        "tokenizer": Path(tokenizer.name).name,
        "tokenizer_sha256": tokenizer.fingerprint,
        **text,
        "windows": {domain: len(each) for domain, each in windows.items()},
        "tokens": {domain: each.tokens_NS.numel() for domain, each in windows.items()},
    }
    if any(compared.values()):
        said["compared_targets"] = {
            domain: windows[domain][:count].targets for domain, count in compared.items()
        }
    return MeasuredText(windows, said, compared)
