"""Draws without replacement written out: probabilities by enumeration, scores by autograd.
Independent of the package's formulas.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch


def log_probability(logits_M: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """log P of drawing exactly ``order``, one member after the other from those left, p ~
    exp(logits).
    """
    left, total = list(range(len(logits_M))), logits_M.new_zeros(())
    for position in order:
        total = total + logits_M[position] - torch.logsumexp(logits_M[left], 0)
        left.remove(position)
    return total


def log_set_probability(logits_M: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
    """log P of the set, over all its orders."""
    return torch.logsumexp(
        torch.stack(
            [log_probability(logits_M, order) for order in itertools.permutations(positions)]
        ),
        0,
    )


def score(logits_M: torch.Tensor, positions: Sequence[int], kind: str) -> torch.Tensor:
    """d log P / d logits, (M,) fp64, of the order ``positions`` or of their set."""
    leaf = logits_M.detach().double().clone().requires_grad_()
    value = (
        log_probability(leaf, positions)
        if kind == "ordered"
        else log_set_probability(leaf, positions)
    )
    (gradient,) = torch.autograd.grad(value, leaf)
    return gradient
