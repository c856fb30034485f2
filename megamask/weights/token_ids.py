"""The ids of special tokens that a config.json tells generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def token_ids(tokenizer: Path) -> dict[str, int | None]:
    """Key of config.json -> id, or None where the tokenizer has no such token. Without these keys
    transformers takes the ids of LLaMA's first tokenizer, and generation does not end.

    Args:
        tokenizer: a Hugging Face folder or a sentencepiece file.

    Raises:
        Exception: whatever the library raises that cannot read it.
    """
    if tokenizer.is_file():
        from sentencepiece import SentencePieceProcessor

        pieces: Any = SentencePieceProcessor(model_file=str(tokenizer))
        found = (pieces.bos_id(), pieces.eos_id(), pieces.pad_id())
        return {key: one if one >= 0 else None for key, one in zip(IDS, found, strict=True)}
    from transformers import AutoTokenizer

    loaded: Any = AutoTokenizer.from_pretrained(str(tokenizer))
    return {key: getattr(loaded, key) for key in IDS}
