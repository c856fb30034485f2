"""The k-subset distribution written out a second time, slowly: every set of N positions, fp64 and
autograd.

Shapes: O out_features, I in_features, G groups per row, C candidates, M group size.
"""

from __future__ import annotations

import itertools
from functools import cache

import torch

PATTERNS = [(1, 4), (2, 4), (3, 4), (2, 8), (4, 8), (8, 16)]


@cache
def table(n: int, m: int) -> torch.Tensor:
    """All 0/1 words with n ones, (C, M) fp64."""
    sets = torch.tensor(list(itertools.combinations(range(m), n)))
    return torch.zeros(len(sets), m, dtype=torch.float64).scatter_(1, sets, 1)


def probabilities(score_OMG: torch.Tensor, n: int) -> torch.Tensor:
    """P(S) ~ exp(sum of scores), (O, C, G)."""
    return torch.einsum("omg,cm->ocg", score_OMG.double(), table(n, score_OMG.shape[1])).softmax(1)


def mask(
    logits_OMG: torch.Tensor,
    noise_OMG: torch.Tensor,
    n: int,
    kappa: float,
    tau: float,
    hard: bool = False,
) -> torch.Tensor:
    """Sampled mask, (O, I) fp64, differentiable in the logits; ``hard`` is straight-through."""
    score, m = (kappa * logits_OMG.double() + noise_OMG) / tau, logits_OMG.shape[1]
    soft = torch.einsum("ocg,cm->omg", probabilities(score, n), table(n, m))
    if hard:
        kept = torch.zeros_like(soft).scatter_(1, score.topk(n, dim=1).indices, 1)
        soft = kept + soft - soft.detach()
    return soft.transpose(1, 2).flatten(1)


def one_after_the_other(weights: list[float], n: int) -> dict[tuple[int, ...], float]:
    """Probability of every set of n positions drawn without replacement, each with probability ~
    weight among those left.
    """
    chance: dict[tuple[int, ...], float] = {}
    for order in itertools.permutations(range(len(weights)), n):
        probability, left = 1.0, sum(weights)
        for position in order:
            probability *= weights[position] / left
            left -= weights[position]
        key = tuple(sorted(order))
        chance[key] = chance.get(key, 0.0) + probability
    return chance
