"""Windows of a text whose perplexity is measured, and which of their tokens are targets."""

from __future__ import annotations

from dataclasses import dataclass

import torch

NO_TARGET = -1


@dataclass(frozen=True)
class Windows:
    """Tokens that a model reads, and the next token of each.

    Attributes:
        tokens_NS: N windows of S tokens, int64.
        labels_NS: the token that follows each; ``NO_TARGET`` where none counts.
    """

    tokens_NS: torch.Tensor
    labels_NS: torch.Tensor

    @classmethod
    def inside(cls, tokens_NS: torch.Tensor) -> Windows:
        """Windows whose S - 1 targets are their own tokens after the first."""
        labels_NS = tokens_NS.roll(-1, dims=1)
        labels_NS[:, -1] = NO_TARGET
        return cls(tokens_NS, labels_NS)

    @property
    def targets(self) -> int:
        """The number of targets of all windows."""
        return int((self.labels_NS != NO_TARGET).sum())

    def __len__(self) -> int:
        return len(self.tokens_NS)

    def __getitem__(self, rows: slice) -> Windows:
        """Some of the windows."""
        return Windows(self.tokens_NS[rows], self.labels_NS[rows])


def without_tail(ids: list[int], window: int) -> Windows:
    """Windows that do not overlap, without the tail, with ``window`` - 1 targets each."""
    count = len(ids) // window
    tokens = torch.tensor(ids[: count * window], dtype=torch.int64)
    return Windows.inside(tokens.view(count, window))


def every_target(ids: list[int], window: int) -> Windows:
    """Windows of ``window`` tokens in which each token of the text but the first is a target once.

    The last target of a window is the first token of the next window. The last window is filled up
    with copies of the last token, which are no targets, and which no target sees.
    """
    count = max(-(-(len(ids) - 1) // window), 0)
    text = torch.tensor(ids, dtype=torch.int64)
    tokens, labels = text.new_zeros(count * window), text.new_full((count * window,), NO_TARGET)
    tokens[: len(ids) - 1], labels[: len(ids) - 1] = text[:-1], text[1:]
    tokens[len(ids) - 1 :] = text[-1]
    return Windows(tokens.view(count, window), labels.view(count, window))
