"""The tokenizer of a written folder where the model brought none: a sentencepiece file in the form
that transformers reads, and the ids of special tokens that a config.json tells generation.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from megamask.storage import write_json

log = logging.getLogger(__name__)
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
PIECES, SETTINGS = "tokenizer.model", "tokenizer_config.json"
SAMPLES = ("hello world", "  Two spaces, 3.14 and\na line", "Ünïcödé 東京 😀")


def token_ids(folder: Path) -> dict[str, int | None]:
    """Key of config.json -> id, or None where the tokenizer of the folder has no such token.
    Without these keys transformers takes the ids of LLaMA's first tokenizer, and generation does
    not end.

    Raises:
        Exception: whatever the library raises that cannot read it.
    """
    from transformers import AutoTokenizer

    loaded: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    return {key: getattr(loaded, key) for key in IDS}


def write_pieces(file: Path, folder: Path, adds_bos: bool = False) -> None:
    """Write a sentencepiece file into a folder as transformers reads it, and say where it reads
    other ids from a text than sentencepiece, with which the text was tokenized.

    Args:
        file: the sentencepiece file.
        folder: that gets it.
        adds_bos: whether a text begins with a BOS, which the file does not say.
    """
    shutil.copyfile(file, folder / PIECES)
    try:
        from sentencepiece import SentencePieceProcessor

        pieces: Any = SentencePieceProcessor(model_file=str(file))
        known = {"bos": pieces.bos_id(), "eos": pieces.eos_id(), "pad": pieces.pad_id()}
        known["unk"] = pieces.unk_id()
        tokens = {
            f"{name}_token": pieces.id_to_piece(one) if one >= 0 else None
            for name, one in known.items()
        }
        words = {"tokenizer_class": "LlamaTokenizer", "legacy": False, **tokens}
        adds = {"add_bos_token": adds_bos, "add_eos_token": False}
        write_json(folder / SETTINGS, {**words, **adds})
        from transformers import AutoTokenizer

        loaded: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        ids = [loaded(text, add_special_tokens=False)["input_ids"] for text in SAMPLES]
        differs = ids != [pieces.encode(text) for text in SAMPLES]
    except Exception as error:  # the libraries raise errors of many types
        log.warning("%s: transformers cannot read %s: %s", folder, file.name, error)
        return
    if differs:
        what = "%s: transformers reads other ids than sentencepiece from it: use a tokenizer folder"
        log.warning(what, file)
