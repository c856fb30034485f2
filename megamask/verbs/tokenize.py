"""The verb tokenize: text domains -> token shards, split into training and held-out documents."""

from __future__ import annotations

import logging
import re
from dataclasses import replace

from megamask.config import Config, run_paths
from megamask.data.blend import check_blend
from megamask.data.bos import before_document
from megamask.data.shards import read_shards
from megamask.data.shared_text import check_shared_text
from megamask.data.tokenizer import TextTokenizer, load_tokenizer
from megamask.data.write_shards import (
    check_domain,
    is_current,
    say,
    settings_digest,
    summary,
    write_domain,
)
from megamask.errors import ConfigError, MegamaskError
from megamask.leftovers import remove_leftovers
from megamask.storage import remove_partial, require_writable
from megamask.weights.architecture import read_architecture

log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Write ``{run_dir}/shards/<domain>`` for every domain, unless its shards fit the settings. A
    run that was killed goes on at the file of the corpus that it had reached.

    Raises:
        ConfigError, ArtifactError: settings, text or tokenizer cannot work; found before anything
            is tokenized.
    """
    _check_domains(config)
    paths = run_paths(config)
    folder = paths.shards
    require_writable(paths.run_dir)  # where the lock of the shards lies, and what it left behind
    require_writable(folder)
    remove_leftovers(folder, is_alone=True)
    tokenizer = replace(load_tokenizer(config), model_vocab=_model_vocabulary(config))
    _check_eod(config, tokenizer)
    _check_vocabulary(config, tokenizer)
    digests = {name: settings_digest(config, name, tokenizer) for name in config.data.domains}
    stale = [name for name in config.data.domains if not is_current(folder / name, digests[name])]
    for name in stale:
        check_domain(config, name, tokenizer)
    remove_partial(folder, kept=stale)
    for name in config.data.domains:
        state = "kept, settings and tokenizer are the same"
        if name in stale:
            write_domain(config, name, tokenizer, digests[name])
            state = "tokenized"
        say(summary(name, read_shards(folder / name), state))


def _model_vocabulary(config: Config) -> int | None:
    """How many ids the model of the run knows; None where there is no model that can be read."""
    paths = run_paths(config)
    for folder in (paths.hf, paths.weights):
        if (folder / "config.json").is_file():
            try:
                return read_architecture(folder, config.model.ignore_keys).vocab
            except MegamaskError:
                return None  # the verbs that use the model say why
    return None


def _check_vocabulary(config: Config, tokenizer: TextTokenizer) -> None:
    """Check the ids that every document has, and warn of ids that a document may have.

    Raises:
        ArtifactError: the model does not know the tokenizer's token at an end of a document.
    """
    ends = [tokenizer.eod, *before_document(config, tokenizer)]
    tokenizer.check_ids(max((one for one in ends if one is not None), default=0), tokenizer.name)
    if tokenizer.model_vocab is not None and tokenizer.vocab_size > tokenizer.model_vocab:
        log.warning(
            "%s has ids up to %d, the model knows the %d below: text with such an id is refused",
            tokenizer.name,
            tokenizer.vocab_size - 1,
            tokenizer.model_vocab,
        )


def _check_domains(config: Config) -> None:
    domains = config.data.domains
    if not domains:
        raise ConfigError(
            "data.domains",
            domains,
            "at least one text domain",
            "Name one, for example data.domains.code.kind=stdlib.",
        )
    for name in domains:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == "cache":
            raise ConfigError(
                "data.domains",
                name,
                "letters, digits, _ and - (not 'cache'): it names a folder",
                "Rename the domain.",
            )
    check_blend(config)
    check_shared_text(domains)


def _check_eod(config: Config, tokenizer: TextTokenizer) -> None:
    if config.data.eod is not None and tokenizer.eod is None:
        allowed = f"null for the tokenizer {tokenizer.name}, which has no end-of-text token"
        raise ConfigError(
            "data.eod",
            config.data.eod,
            allowed,
            "Name a token, or set data.eod=null for none.",
        )
