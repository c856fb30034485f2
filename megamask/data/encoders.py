"""Processes that turn batches of texts into tokens side by side.

The order of the batches is kept, so the tokens do not depend on the number of processes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from megamask.errors import ArtifactError, ConfigError, printable
from megamask.process.children import die_with
from megamask.process.signals import SIGNALS

AHEAD = 16  # batches that are read or waited for, a process
QUEUED = 2  # batches that a process has, so that it never waits for the next


@dataclass(frozen=True)
class Tokens:
    """The tokens of a batch.

    Attributes:
        ids: of all documents, one after another.
        lengths: tokens of each document, int32 (N,).
    """

    ids: NDArray[Any]
    lengths: NDArray[np.int32]


class HasTexts(Protocol):
    """A batch of documents."""

    @property
    def texts(self) -> list[str]:
        """The texts of the documents."""


@dataclass(frozen=True)
class _Failure:
    """An error of a process, in words: few exceptions can be sent through a pipe.

    Attributes:
        text: its type and message.
    """

    text: str

    @classmethod
    def of(cls, error: BaseException) -> _Failure:
        try:
            said = str(error)
        except Exception:  # an error that cannot say what it is
            said = ""
        return cls(f"{type(error).__name__}: {said}" if said else type(error).__name__)


Encoder = Callable[[Sequence[str]], Tokens]
B = TypeVar("B", bound=HasTexts)


def encoder(
    encode_batch: Callable[[Sequence[str]], list[list[int]]],
    dtype: np.dtype[Any],
    begin: list[int],
    end: list[int],
) -> Encoder:
    """A function from texts to tokens.

    Args:
        encode_batch: texts to ids.
        dtype: of the tokens.
        begin, end: ids before and after the ids of each text.
    """

    def encode(texts: Sequence[str]) -> Tokens:
        ids = [begin + one + end for one in encode_batch(texts)]
        lengths = np.fromiter(map(len, ids), np.int32, len(ids))
        total = int(lengths.sum(dtype=np.int64))
        return Tokens(np.fromiter(chain.from_iterable(ids), dtype, total), lengths)

    return encode


def encoded(
    encode: Encoder, batches: Iterable[B], processes: int, domain: str
) -> Iterator[tuple[B, Tokens]]:
    """Every batch with its tokens, in the order of the batches.

    A single batch, and every batch where ``processes`` is 1, is encoded by this process.

    Every process encodes in a thread that is not its first. In the first thread, glibc's ``malloc``
    works in the heap in which the tokenizer was loaded, and a tokenizer that allocates for every
    token took 1.3 times the CPU seconds there.

    Args:
        encode: texts to tokens; this process must not have started threads for it.
        batches: the batches, which this process reads while others encode.
        processes: number of processes to start.
        domain: name of the domain that the batches come from, for messages.

    Raises:
        ArtifactError: the texts of a batch cannot be encoded.
        ConfigError: a process was killed.
    """
    # The processes are the parallelism. Threads of tokenizers, which a user's own value may start
    # for the first domain, would leave the processes of the next in a deadlock.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    source = iter(batches)
    first = list(islice(source, 2))
    if processes == 1 or len(first) < 2:
        with ThreadPoolExecutor(1) as thread:
            for batch in chain(first, source):
                yield batch, _checked(thread.submit(_encode, encode, batch.texts).result(), domain)
        return
    with _Workers[B](encode, processes, domain) as workers:
        yield from workers.run(chain(first, source))


class _Workers(Generic[B]):
    """The processes. The object is a context manager."""

    def __init__(self, encode: Encoder, processes: int, domain: str) -> None:
        self._encode, self._count, self._domain = encode, processes, domain
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []

    def __enter__(self) -> _Workers[B]:
        # A forked process has the tokenizer in memory already.
        context = multiprocessing.get_context("fork")
        for _ in range(self._count):
            mine, other = context.Pipe()
            arguments = (other, [*self._pipes, mine], self._encode, os.getpid())
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            other.close()
            self._pipes.append(mine)
            self._processes.append(process)
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()  # it may be in the middle of a batch that nobody wants
            process.join()

    def run(self, source: Iterator[B]) -> Iterator[tuple[B, Tokens]]:
        """The batches of ``source`` with their tokens."""
        working = {pipe: deque[int]() for pipe in self._pipes}  # batches that a process has
        waiting, done = dict[int, B](), dict[int, Tokens]()
        sent = given = 0
        batch = next(source, None)
        while batch is not None or waiting:
            pipe = min(working, key=lambda one: len(working[one]))
            is_free = len(working[pipe]) < QUEUED and sent - given < AHEAD * self._count
            if batch is not None and is_free:
                self._talk(pipe, pipe.send, batch.texts)
                working[pipe].append(sent)
                waiting[sent] = batch
                sent += 1
                batch = next(source, None)  # while the processes work
                continue
            for ready in wait([one for one, numbers in working.items() if numbers]):
                assert isinstance(ready, Connection)
                done[working[ready].popleft()] = self._result(ready)
            while given in done:
                yield waiting.pop(given), done.pop(given)
                given += 1

    def _result(self, pipe: Connection) -> Tokens:
        return _checked(self._talk(pipe, pipe.recv), self._domain)

    def _talk(self, pipe: Connection, act: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return act(*arguments)
        except (EOFError, OSError) as error:
            process = self._processes[self._pipes.index(pipe)]
            process.join(1)
            code = process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            allowed = f"as many processes as there is memory for; one ended early ({how})"
            fix = "Lower data.processes; the verb goes on where it was."
            raise ConfigError("data.processes", self._count, allowed, fix) from error


def _encode(
    encode: Encoder, texts: Sequence[str], caught: type[BaseException] = Exception
) -> Tokens | _Failure:
    """The tokens of texts, or why there are none."""
    try:
        return encode(texts)
    except caught as error:
        return _Failure.of(error)


def _checked(result: Any, domain: str) -> Tokens:
    """The tokens.

    Raises:
        ArtifactError: there are none.
    """
    if isinstance(result, _Failure):
        fix = "Check the tokenizer (data.tokenizer) and the texts of the domain."
        problem = f"cannot be tokenized ({printable(result.text)})"
        raise ArtifactError(f"data.domains.{domain}", problem, fix)
    assert isinstance(result, Tokens)
    return result


def _serve(pipe: Connection, others: list[Connection], encode: Encoder, parent: int) -> None:
    """Encode what comes through a pipe, until its other end is closed. The parent alone reacts to
    signals.
    """
    die_with(parent)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    for other in others:
        other.close()

    def answer(texts: Sequence[str]) -> None:
        with suppress(OSError):
            pipe.send(_encode(encode, texts, BaseException))

    # The first thread takes what comes at once, so the parent never waits until it is taken.
    with ThreadPoolExecutor(1) as thread, suppress(EOFError, OSError):
        while True:
            thread.submit(answer, pipe.recv())
