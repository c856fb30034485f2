"""Where the beginning-of-text token (BOS) stands: before each document, before each window.

A model that always saw a BOS spends attention on it (an attention sink), so its masks are learned,
and its perplexity is measured, with the BOS where it was in the model's own training. Learning
samples are the exception: they are cut out of the documents one after the other, so most of them
begin in the middle of a document, without a BOS, while calibration samples and the windows of an
evaluation begin with one.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megamask.config import Config
from megamask.data.tokenizer import TextTokenizer
from megamask.errors import ConfigError

Place = Literal["none", "stream", "window"]
Chosen = Literal["auto", "window"] | bool  # ``evaluate.bos``
PLACES: dict[Place, str] = {
    "none": "none",
    "stream": "one at the start",
    "window": "one at the start of each window",
}
OF_DOCUMENT = "one before each document"


def before_document(config: Config, tokenizer: TextTokenizer) -> list[int]:
    """The ids that each document begins with: the BOS, or nothing.

    ``data.bos=auto`` follows the tokenizer: a BOS where it puts one before a prompt.

    Raises:
        ConfigError: ``data.bos`` asks for a BOS, and the tokenizer has none.
    """
    wanted = tokenizer.adds_bos if config.data.bos == "auto" else config.data.bos
    return [_bos("data.bos", tokenizer)] if wanted else []


def in_windows(config: Config, tokenizer: TextTokenizer) -> Place:
    """Where ``evaluate.bos`` puts the BOS: nowhere, before the held-out stream, or before each
    window.

    Raises:
        ConfigError: it asks for a BOS, and the tokenizer has none.
    """
    chosen = config.evaluate.bos
    if chosen not in ("auto", False):
        _bos("evaluate.bos", tokenizer)
    return _place(chosen, begins=chosen == "auto" and bool(before_document(config, tokenizer)))


def description(config: Config, tokenizer: TextTokenizer) -> str:
    """The BOS of the perplexity protocol, in words."""
    return _in_words(in_windows(config, tokenizer), bool(before_document(config, tokenizer)))


def is_described(chosen: Chosen, described: str) -> bool:
    """Whether ``described``, the BOS of a protocol in words, is what ``evaluate.bos=chosen`` gives
    for the same documents.
    """
    begins = OF_DOCUMENT in described
    return described == _in_words(_place(chosen, begins), begins)


def _place(chosen: Chosen, begins: bool) -> Place:
    """What ``evaluate.bos`` means. ``begins`` says whether each document begins with a BOS."""
    if chosen == "auto":
        return "window" if begins else "none"
    if chosen == "window":
        return "window"
    return "stream" if chosen else "none"


def _in_words(place: Place, begins: bool) -> str:
    if not begins:
        return PLACES[place]
    return OF_DOCUMENT if place == "none" else f"{PLACES[place]}, and {OF_DOCUMENT}"


def cut_windows(
    stream: NDArray[np.int64], window: int, place: Place, bos: int | None, most: int | None
) -> NDArray[np.int64]:
    """The stream in windows without overlap, without the tail that is shorter than a window.

    A BOS is never doubled: where a window begins with the BOS of a document, that is its BOS.

    Args:
        stream: tokens, one-dimensional.
        window: tokens of a window, the BOS included.
        place: where a BOS is added.
        bos: its id.
        most: limit of the tokens of all windows.

    Returns:
        int64 (N, window); N is 0 where the stream is too short.
    """
    if place == "stream" and len(stream) and stream[0] != bos:
        stream = np.concatenate([np.array([bos], np.int64), stream])
    if place != "window":
        count = len(stream[:most]) // window
        return stream[: count * window].reshape(count, window)
    rows, at = [np.empty((0, window), np.int64)], 0
    while most is None or len(rows) * window <= most:
        added = [] if at < len(stream) and stream[at] == bos else [bos]
        row = np.concatenate([np.array(added, np.int64), stream[at : at + window - len(added)]])
        if len(row) < window:
            break
        rows.append(row[None])
        at += window - len(added)
    return np.concatenate(rows)


def begun(tokens_S: Tensor, begin: list[int]) -> Tensor:
    """A sample of the same length that begins with ``begin``; its last tokens make room."""
    if not begin or tokens_S[0].item() == begin[0]:
        return tokens_S
    return torch.cat([tokens_S.new_tensor(begin), tokens_S])[: len(tokens_S)]


def _bos(key: str, tokenizer: TextTokenizer) -> int:
    if tokenizer.bos is None:
        allowed = f"false for the tokenizer {tokenizer.name}, which has no BOS"
        raise ConfigError(key, True, allowed, f"Set {key}=false.")
    return tokenizer.bos
