"""How strongly a prior mask pulls under the k-subset distribution, so that learning starts as
undecided as under the categorical distribution.

The categorical start (MaskLLM, arXiv 2409.17481, Eq. 9-10) gives candidate c the score

    s (N(0, 1) + alpha * overlap(c, prior)),  s = kappa_0 * std,

and so a probability of every candidate, with some mean entropy H(alpha). The subset start gives
every position noise and a bonus. Two numbers are chosen:

- noise_scale: a position's noise has this times std,

      sqrt((C - 1) / C * M / (N (M - N))),

  so that the variance of the scores within a group is that of the categorical start.
- bonus: kept positions get std * bonus, where the mean entropy of P(S) ~ exp(sum of kappa_0 pi)
  equals H(alpha). Without noise bonus = alpha exactly, because overlap is a sum over positions;
  with noise, it stays within some percent of alpha at s = 1. For N = 1 or M - 1 the two starts are
  the same.

Both entropies are means over a fixed sample of groups. For a pattern with many candidates, H sums
STRATUM random ones of every overlap, weighted by how many there are.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from megamask.sparsity.pattern import Pattern
from megamask.sparsity.subset.k_subset import subset_entropy

STRATUM = 1024
GROUPS = 8192  # of the sample; fewer where a group has many candidates
NUMBERS = 1 << 21
CERTAIN = 1e-9  # nats


def noise_scale(pattern: Pattern) -> float:
    """Standard deviation of a position's initial logit over that of a candidate's."""
    n, m, candidates = pattern.n, pattern.m, pattern.num_candidates
    return math.sqrt((candidates - 1) / candidates * m / (n * (m - n)))


@lru_cache
def position_bonus(pattern: Pattern, strength: float, spread: float) -> float:
    """The bonus of kept positions, in units of the candidates' std.

    Args:
        pattern: N:M.
        strength: alpha.
        spread: s, kappa_0 times the candidates' std; 0 stands for no noise.
    """
    if spread == 0 or strength == 0 or pattern.n in (1, pattern.m - 1):
        return strength
    target = categorical_entropy(pattern, strength, spread)
    # No entropy is left to match: many strengths would do, and small ones would let go of the prior
    # too soon.
    if target < CERTAIN:
        return strength
    if mean_subset_entropy(pattern, 0.0, spread) <= target:
        return 0.0
    low, high = 0.0, strength
    while mean_subset_entropy(pattern, high, spread) > target:
        low, high = high, 2 * high
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (
            (middle, high)
            if mean_subset_entropy(pattern, middle, spread) > target
            else (low, middle)
        )
    return (low + high) / 2


def categorical_entropy(pattern: Pattern, strength: float, spread: float) -> float:
    """Mean entropy, in nats, of softmax(s (noise + alpha * overlap)) over candidates."""
    n, m = pattern.n, pattern.m
    overlaps = range(max(0, 2 * n - m), n + 1)
    counts = [math.comb(n, overlap) * math.comb(m - n, n - overlap) for overlap in overlaps]
    sizes = [min(count, STRATUM) for count in counts]
    overlap_C = torch.cat(
        [torch.full((size,), float(overlap)) for overlap, size in zip(overlaps, sizes, strict=True)]
    ).double()
    weight_C = torch.cat(
        [
            torch.full((size,), math.log(count / size))
            for count, size in zip(counts, sizes, strict=True)
        ]
    ).double()
    score_GC = spread * (
        _noise(min(GROUPS, NUMBERS // sum(sizes)), sum(sizes)) + strength * overlap_C
    )
    log_whole = torch.logsumexp(score_GC + weight_C, 1, keepdim=True)
    probability_GC = (score_GC + weight_C - log_whole).exp()
    return float((log_whole.squeeze(1) - (probability_GC * score_GC).sum(1)).mean())


def mean_subset_entropy(pattern: Pattern, bonus: float, spread: float) -> float:
    """Mean entropy, in nats, of P(S) ~ exp(sum of s (noise + bonus on N positions))."""
    n, m = pattern.n, pattern.m
    score_GM = (
        spread * noise_scale(pattern) * _noise(min(GROUPS, NUMBERS // (8 * m * min(n, m - n))), m)
    )
    score_GM[:, : pattern.n] += spread * bonus
    return float(subset_entropy(score_GM.unsqueeze(-1), pattern).mean())


def _noise(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(
        rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
