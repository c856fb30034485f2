"""One interface for both kinds of tokenizers that models come with: a Hugging Face folder, or a
sentencepiece ``.model`` file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamask.config import Config, run_paths
from megamask.errors import ArtifactError, ConfigError

Encode = Callable[[Sequence[str]], list[list[int]]]


@dataclass(frozen=True)
class TextTokenizer:
    """Text to token ids.

    Attributes:
        name: the path of the tokenizer.
        vocab_size: a number that is larger than every id.
        eod: the id that ends a document, or None.
        bos: the id that begins a text, or None.
        fingerprint: SHA-256 over the parts that decide the ids; tokenizers with equal fingerprints
            give equal ids.
        encode_batch: texts to ids, without special tokens.
        adds_bos: whether the tokenizer puts its BOS before a prompt. A sentencepiece ``.model``
            file does not say, so it adds none.
        model_vocab: the ids that the model knows are below this number; None where no model is
            there to ask.
        eos: the tokenizer's own id of an end, whatever ends the documents of ``data.eod``.
    """

    name: str
    vocab_size: int
    eod: int | None
    bos: int | None
    fingerprint: str
    encode_batch: Encode = field(repr=False)
    adds_bos: bool = False
    model_vocab: int | None = None
    eos: int | None = None

    def check_ids(self, largest: int, place: Path | str) -> None:
        """Check that the model knows the ids of a text.

        Raises:
            ArtifactError: ``largest`` is an id that the model does not know; ``place`` is named.
        """
        if self.model_vocab is not None and largest >= self.model_vocab:
            problem = f"gives the token id {largest}, the model knows the {self.model_vocab} below"
            fix = "Set data.tokenizer to the tokenizer of the model."
            raise ArtifactError(place, problem, fix)

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``.

        No special token is added, and the name of a special token in the text is plain text.
        """
        return self.encode_batch([text])[0]


def load_tokenizer(config: Config) -> TextTokenizer:
    """The tokenizer of ``data.tokenizer``, or of the model's own folder.

    Raises:
        ArtifactError: there is no tokenizer at that path, or the tokenizer cannot be read.
        ConfigError: ``data.eod`` is not in the vocabulary.
    """
    path = Path(config.data.tokenizer) if config.data.tokenizer else run_paths(config).hf
    fix = "Point data.tokenizer at a Hugging Face folder or a sentencepiece .model file"
    fix += "." if config.data.tokenizer else ", set model.hf, or run the verb gguf first."
    if not path.exists():
        raise ArtifactError(path, "has no tokenizer: it does not exist", fix)
    load = _load_sentencepiece if path.is_file() else _load_hf
    try:
        return load(path, config.data.eod)
    except ImportError as error:
        raise ArtifactError(
            path,
            f"needs a package that is not installed ({error})",
            "Install that package with pip.",
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise ArtifactError(path, f"holds no tokenizer that can be read ({reason})", fix) from error


def _load_hf(path: Path, eod: str | None) -> TextTokenizer:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(path))
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if not vocabulary:
        raise ValueError("its vocabulary is empty")
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("x")["input_ids"][:1] == [bos]
    backend = _published(path) or getattr(tokenizer, "backend_tokenizer", None)
    return TextTokenizer(
        name=str(path),
        vocab_size=max(vocabulary.values()) + 1,
        eod=_eod_id(eod, vocabulary.get, tokenizer.eos_token_id),
        bos=bos,
        fingerprint=_hash_slow(tokenizer, vocabulary)
        if backend is None
        else _hash_fast(backend.to_str()),
        encode_batch=_slow_encoder(tokenizer) if backend is None else _fast_encoder(backend),
        adds_bos=adds_bos,
        eos=tokenizer.eos_token_id,
    )


def _published(path: Path) -> Any:
    """The tokenizer of ``tokenizer.json``; None if there is no such file.

    transformers rebuilds the tokenizer from the class that tokenizer_config.json names. Byte-level
    tokenizers that are labelled LlamaTokenizer lost every space in some of its releases.
    """
    from tokenizers import Tokenizer

    file = path / "tokenizer.json"
    return Tokenizer.from_file(str(file)) if file.is_file() else None


def _fast_encoder(backend: Any) -> Encode:
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return lambda texts: [
        encoding.ids
        for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)
    ]


def _slow_encoder(tokenizer: Any) -> Encode:
    return lambda texts: [
        tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)[
            "input_ids"
        ]
        for text in texts
    ]


def _hash_fast(serialized: str) -> str:
    """Hash of the parts that decide the ids: not padding, truncation, templates and decoding."""
    parts = json.loads(serialized)
    deciding = {
        key: parts.get(key) for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")
    }
    return _sha256(json.dumps(deciding, sort_keys=True).encode())


def _hash_slow(tokenizer: Any, vocabulary: dict[str, int]) -> str:
    return _sha256(json.dumps([type(tokenizer).__name__, sorted(vocabulary.items())]).encode())


def _load_sentencepiece(path: Path, eod: str | None) -> TextTokenizer:
    from sentencepiece import SentencePieceProcessor

    processor: Any = SentencePieceProcessor(model_file=str(path))
    vocabulary = {processor.id_to_piece(index): index for index in range(processor.vocab_size())}
    return TextTokenizer(
        name=str(path),
        vocab_size=processor.vocab_size(),
        eod=_eod_id(eod, vocabulary.get, _id_or_none(processor.eos_id())),
        bos=_id_or_none(processor.bos_id()),
        fingerprint=_sha256(path.read_bytes()),
        encode_batch=lambda texts: processor.encode(list(texts), num_threads=1),
        eos=_id_or_none(processor.eos_id()),
    )


def _eod_id(token: str | None, lookup: Callable[[str], int | None], eos: int | None) -> int | None:
    if token is None:
        return None
    if token == "auto":
        return eos
    index = lookup(token)
    if index is None:
        raise ConfigError(
            "data.eod",
            token,
            "a token of the vocabulary",
            "Correct it, or leave it out for the tokenizer's EOS.",
        )
    return index


def _id_or_none(index: int) -> int | None:
    return index if index >= 0 else None  # sentencepiece says -1


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
