"""How far two fp32 backends of the k-subset distribution may lie apart, entry by entry.

Scores that err by e change the probability of every set of N, relatively, by 2 K e at most, K =
min(N, M - N). The positions of a set are negatively correlated and their covariances with one
position sum to 0, so that a marginal m moves by

    sum_i |Cov(1_i, 1_j)| e = 2 m (1 - m) e.

A covariance is a sum over pairs of sets, one with j and one without, of
P(S) P(S') (D(S) - D(S')): every term moves by 4 K e of itself. So the allowed error is relative to
the terms that cancel, |D(S)| + |D(S')|, and not to their sum; ``terms`` adds these up.

Shapes: O out_features, I in_features, G groups per row, M group size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megamask.sparsity.draw import Sample, Site, scores
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.subset import k_subset

EPS = 2.0**-24  # fp32 rounds to 24 bits


class Bounds(NamedTuple):
    """Largest differences to expect: at the masked weight (O, I), and at the gradient of the logits
    (O, M, G).
    """

    masked: torch.Tensor
    gradient: torch.Tensor


def bounds(
    grad: torch.Tensor,
    logits: torch.Tensor,
    weight: torch.Tensor,
    site: Site,
    draw: Sample,
    norm_coef: float,
    g_error: float = 0.0,
) -> Bounds:
    """Those of one draw; ``g_error`` is what approximate logarithms of a device add to the error of
    a Gumbel.
    """
    grad, logits, weight = grad.double(), logits.double(), weight.double()
    n, m = site.pattern.n, site.pattern.m
    score = scores(logits, site, draw)  # fp64: equal to brute force by test_linear_distribution.py
    noise = score * draw.tau - draw.kappa * logits
    # Both sides round kappa pi, g (two logs of a few ulp each; absolute where g is near 0), the sum
    # and the quotient: about 8 roundings.
    error = (8 * EPS * (draw.kappa * logits.abs() + noise.abs() + 1) + g_error).amax(
        1, keepdim=True
    ) / draw.tau
    # A coefficient multiplies at most M factors, each with an exp of relative error 4 EPS and two
    # roundings; both sides, products included.
    rounds = 2 * 6 * m * EPS
    kept, left = shares(score, site.pattern)
    mask = (
        2 * kept * left * error + rounds * kept
    )  # fused kernels divide by the sum over all sets: of a position near 1 that rounds too
    mask_OI = mask.transpose(1, 2).flatten(1)
    if draw.hard:
        kept, mask_OI = k_subset.largest(score, site.pattern), torch.zeros_like(mask_OI)
    norm = 2 * norm_coef * weight.square()
    slope = grad * weight - norm * kept.transpose(1, 2).flatten(1)
    slope_error = norm * mask_OI + 4 * EPS * ((grad * weight).abs() + norm)
    slope, slope_error = (one.unflatten(1, (-1, m)).transpose(1, 2) for one in (slope, slope_error))
    # Four polynomials in the numerator's products and the denominator squared; the sums with d
    # round three times a position.
    relative = 4 * min(n, m - n) * error + 4 * rounds
    gradient = terms(score, slope, site.pattern) * relative + terms(
        score, slope_error, site.pattern
    )
    return Bounds(weight.abs() * mask_OI, draw.kappa / draw.tau * gradient)


def check_within(
    found: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor, rounding: float
) -> None:
    """Every entry within its bound plus ``rounding``, relative, of the result to its dtype (1e-32:
    what lies below fp32 may be 0).
    """
    difference, allowed = (
        (found.double() - expected.double()).abs(),
        bound + rounding * expected.double().abs() + 1e-32,
    )
    assert bool((difference <= allowed).all()), (
        f"{float((difference / allowed).max())} times as far apart as allowed"
    )


def terms(score: torch.Tensor, slope: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Sum over pairs of sets, one with j and one without, of P(S) P(S') (|D(S)| + |D(S')|) with
    sums of |slope|, (O, M, G).

    For N > M/2 of the sets of the positions left out, as the backends count then.
    """
    n, m = pattern.n, pattern.m
    if 2 * n > m:
        score, pattern = -score, Pattern(m - n, m)
    kept, left, size = *shares(score, pattern), slope.abs()
    covariance = k_subset.covariances(score, size, pattern)  # of j's presence with sum |slope|
    return 2 * kept * left * (kept * size).sum(1, keepdim=True) + (left - kept) * covariance


def shares(score: torch.Tensor, pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor]:
    """m and 1 - m, (O, M, G), both right relatively."""
    left = k_subset.marginals(-score, Pattern(pattern.m - pattern.n, pattern.m))
    return k_subset.marginals(score, pattern), left
