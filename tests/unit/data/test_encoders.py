"""Batches of texts become tokens in several processes: their order, their errors, their end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest

from megamask.data.encoders import Tokens, encoded, encoder
from megamask.errors import ArtifactError, ConfigError


class Texts:
    """A batch of texts."""

    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)


def letters(texts: Any) -> list[list[int]]:
    return [[ord(letter) for letter in text] for text in texts]


PLAIN = encoder(letters, np.dtype(np.uint16), [1], [2])


def test_batches_come_in_their_order_whatever_takes_long() -> None:
    def encode(texts: Any) -> Tokens:
        time.sleep(0.03 if texts[0].startswith("a") else 0)
        return PLAIN(texts)

    batches = [Texts("ab" if number % 3 == 0 else "c", str(number), "") for number in range(20)]
    found = list(encoded(encode, batches, 3, "web"))
    assert [batch for batch, _ in found] == batches
    for batch, tokens in found:
        expected = [[1, *map(ord, text), 2] for text in batch.texts]
        assert tokens.lengths.tolist() == [len(ids) for ids in expected]
        assert tokens.ids.tolist() == sum(expected, [])


@pytest.mark.timeout(60)
def test_large_batches_are_exchanged_while_all_processes_work() -> None:
    """Texts and tokens of a batch are larger than the buffer of a pipe, so a parent that waits
    until a batch is taken, and a process that waits until its tokens are taken, would wait for
    ever.
    """
    batches = [Texts(chr(65 + number) * 2**20) for number in range(8)]
    for batch, tokens in encoded(PLAIN, batches, 2, "web"):
        assert tokens.lengths.tolist() == [2**20 + 2]
        assert (tokens.ids[1:-1] == ord(batch.texts[0][0])).all()


@pytest.mark.parametrize("processes", [1, 2])
def test_no_process_encodes_in_its_first_thread(processes: int) -> None:
    """The first thread allocates in the heap of the loaded tokenizer, which takes longer."""

    def encode(texts: Any) -> Tokens:
        is_first = threading.current_thread() is threading.main_thread()
        return Tokens(np.array([is_first, os.getpid()], np.int32), np.array([2], np.int32))

    batches = [Texts("a"), Texts("b"), Texts("c")]
    found = [tokens.ids.tolist() for _, tokens in encoded(encode, batches, processes, "web")]
    assert [is_first for is_first, _ in found] == [0, 0, 0]
    assert (os.getpid() in {process for _, process in found}) == (processes == 1)


def test_threads_of_the_tokenizer_are_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own value started them in the first domain, and the next one hung."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    found = []

    def encode(texts: Any) -> Tokens:
        found.append(os.environ["TOKENIZERS_PARALLELISM"])
        return Tokens(np.array([0], np.int32), np.array([1], np.int32))

    list(encoded(encode, [Texts("a")], 1, "web"))
    assert found == ["false"]


class UnsentError(Exception):
    """An error that no pipe carries: it holds a function, and its arguments are not its text."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"bad {first} {second}")
        self.call = lambda: None


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "error",
    [
        ValueError("bad text here"),
        UnsentError("text", "here"),
        ConfigError("data.tokenizer", 3, "bad text here", "Fix it."),
    ],
)
def test_an_error_of_any_process_names_the_domain(error: Exception, processes: int) -> None:
    def encode(texts: Any) -> Tokens:
        if texts == ["bad"]:
            raise error
        return PLAIN(texts)

    batches = [Texts("a"), Texts("b"), Texts("bad"), Texts("c")]
    said = rf"data\.domains\.web: cannot be tokenized \({type(error).__name__}: .*bad text here"
    with pytest.raises(ArtifactError, match=said):
        list(encoded(encode, batches, processes, "web"))
    assert not multiprocessing.active_children()


def test_a_process_that_is_killed_is_told_with_a_fix() -> None:
    def encode(texts: Any) -> Tokens:
        if texts == ["bad"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return PLAIN(texts)

    with pytest.raises(ConfigError, match=r"data\.processes.*SIGKILL"):
        list(encoded(encode, [Texts("a"), Texts("bad"), Texts("c"), Texts("d")], 2, "web"))
    assert not multiprocessing.active_children()
