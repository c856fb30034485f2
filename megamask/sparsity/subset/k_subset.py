"""The k-subset distribution in plain PyTorch: one logit per weight, any N:M. The readable reference
of every backend.

The score of a set S of N positions is the sum of its positions' scores. A draw adds one Gumbel g to
the score of every position,

    l = (kappa pi + noise g) / tau.

The hard mask keeps the N largest l. The soft mask is the exact probability that each position is in
S under

    P(S) ~ exp(sum_{i in S} l_i).

It sums to N and tends to the hard mask as tau falls. Exact marginals of a k-subset are those of
SIMPLE (arXiv 2210.01941); kappa, tau and the relaxation by Gumbel noise are those of MaskLLM (arXiv
2409.17481).

Which distribution the hard masks have: to keep the N largest of kappa pi + g is to draw N positions
one after the other without replacement, each with probability ~ exp(kappa pi) among the positions
left (Plackett-Luce). Noise on candidates, as in gumbel_softmax.py, would draw

    P(S) ~ exp(kappa sum_{i in S} pi_i).

The two differ unless N = 1. The most probable set of both is that of the N largest logits, the hard
mask without noise. ``mask_statistics`` reports the second probability, which no noise enters.

Marginals. Let t lie midway between the N-th and the next largest l. The factor of position j is
1 + e^(l_j - t) z. Divided by the larger of its two terms it is u_j + v_j z, where one of u_j, v_j
is 1 and the other e^-|l_j - t|. Let P_j[c] be the coefficient of z^c in the product of the factors
before j, and S_j[c] that in the product of the factors from j on. The sums over the sets of N - 1
and of N other positions are

    A_j = sum_c P_j[c] S_{j+1}[N - 1 - c]
    B_j = sum_c P_j[c] S_{j+1}[N - c]

and the marginal is

    m_j = v_j A_j / (v_j A_j + u_j B_j).

Nothing is subtracted and no term overflows. The denominator is at least 1: of the best set every
factor's term is 1, so that A_j >= 1 for a kept position and B_j >= 1 for another. A term that
underflows is below the smallest fp32 at any tau. For N > M/2 the M - N positions left out are drawn
instead, which swaps u with v: fewer coefficients.

Gradient. With d the gradient at the mask, the gradient at l_j is

    Cov(1_j, sum_i d_i 1_i) = u_j v_j (d_j A_j B_j + A'_j B_j - B'_j A_j) / (v_j A_j + u_j B_j)^2

where A'_j, B'_j weigh every set of A_j, B_j by its sum of d. It is m_j (1 - m_j) times the
difference between the expected sum of d with and without j.

Shapes: O out_features, I in_features, G groups per row, M group size, K = min(N, M - N).
mask_logits are (O, M, G).
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch

from megamask.sparsity.draw import (
    RETURNED,
    GradientSink,
    Sample,
    Sampled,
    Site,
    computing_dtype,
    scores,
)
from megamask.sparsity.pattern import Pattern


class Factors(NamedTuple):
    """u + v z of every position, lists over M of (O, G); and the size K of the counted sets."""

    u: list[torch.Tensor]
    v: list[torch.Tensor]
    size: int


def factors(score_OMG: torch.Tensor, pattern: Pattern) -> Factors:
    """Factors whose terms in the best set are 1; NaN in all of a group with a score that is not
    finite.
    """
    n, m = pattern.n, pattern.m
    falling = score_OMG.sort(dim=1, descending=True).values
    threshold = (0.5 * falling[:, n - 1] + 0.5 * falling[:, n]).unsqueeze(1)
    distance = score_OMG - (threshold + _sum(score_OMG - score_OMG).unsqueeze(1))
    small = (-distance.abs()).exp()
    one = torch.ones_like(small)
    u, v = (
        torch.where(distance > 0, small, one).unbind(1),
        torch.where(distance > 0, one, small).unbind(1),
    )
    return Factors(list(u), list(v), n) if 2 * n <= m else Factors(list(v), list(u), m - n)


def _sum(terms_OMG: torch.Tensor) -> torch.Tensor:
    """Sum over axis 1, (O, G), in order. ``sum`` picks its order by shape: shards would differ in
    bits.
    """
    return reduce(torch.add, terms_OMG.unbind(1))


def _times(poly: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Coefficients 0 .. K of ``poly`` (K + 1, O, G) times u + v z."""
    return torch.cat([u * poly[:1], u * poly[1:] + v * poly[:-1]])


def _times_both(
    poly: torch.Tensor, sums: torch.Tensor, u: torch.Tensor, v: torch.Tensor, d: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``poly`` (sums of w(S)) and ``sums`` (of w(S) d(S)) with one more position."""
    return _times(poly, u, v), torch.cat(
        [u * sums[:1], u * sums[1:] + v * (sums[:-1] + d * poly[:-1])]
    )


def _one(like: torch.Tensor, size: int) -> torch.Tensor:
    """The polynomial 1, (K + 1, O, G)."""
    one = like.new_zeros(size + 1, *like.shape)
    one[0] = 1
    return one


def _coefficient(a: torch.Tensor, b: torch.Tensor, degree: int) -> torch.Tensor:
    """Coefficient of z^degree in a b, (O, G)."""
    return reduce(torch.add, (a[c] * b[degree - c] for c in range(degree + 1)))


def _suffixes(law: Factors) -> list[torch.Tensor]:
    """S_1 .. S_M."""
    suffix, found = _one(law.u[0], law.size), []
    for u, v in zip(reversed(law.u), reversed(law.v), strict=True):
        found.append(suffix)
        suffix = _times(suffix, u, v)
    return found[::-1]


def marginals(score_OMG: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Probability that each position is in S, P(S) ~ exp(sum of scores), (O, M, G)."""
    law = factors(score_OMG, pattern)
    prefix, kept = _one(law.u[0], law.size), []
    for u, v, suffix in zip(law.u, law.v, _suffixes(law), strict=True):
        drawn, left = (
            v * _coefficient(prefix, suffix, law.size - 1),
            u * _coefficient(prefix, suffix, law.size),
        )
        kept.append((drawn if law.size == pattern.n else left) / (drawn + left))
        prefix = _times(prefix, u, v)
    return torch.stack(kept, dim=1)


def covariances(score_OMG: torch.Tensor, slope_OMG: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Covariance of each position's presence with the sum of ``slope`` over S, (O, M, G): the
    marginals' Jacobian times ``slope``.
    """
    law, slopes, found = factors(score_OMG, pattern), slope_OMG.unbind(1), []
    one, tails = _one(law.u[0], law.size), []
    suffix, suffix_sums = one, torch.zeros_like(one)
    for u, v, d in zip(reversed(law.u), reversed(law.v), reversed(slopes), strict=True):
        tails.append((suffix, suffix_sums))
        suffix, suffix_sums = _times_both(suffix, suffix_sums, u, v, d)
    prefix, sums = one, torch.zeros_like(one)
    for u, v, d, (suffix, suffix_sums) in zip(law.u, law.v, slopes, reversed(tails), strict=True):
        a, b = (_coefficient(prefix, suffix, k) for k in (law.size - 1, law.size))
        qa, qb = (
            _coefficient(sums, suffix, k) + _coefficient(prefix, suffix_sums, k)
            for k in (law.size - 1, law.size)
        )
        whole = v * a + u * b
        found.append((v / whole) * (u / whole) * (d * a * b + (qa * b - qb * a)))
        prefix, sums = _times_both(prefix, sums, u, v, d)
    return torch.stack(found, dim=1)


def largest(score_OMG: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """0/1 mask, (O, M, G), of the N largest scores; ties go to the earlier position; NaN where a
    score is not finite.
    """
    kept = score_OMG.argsort(dim=1, descending=True, stable=True)[:, : pattern.n]
    return torch.zeros_like(score_OMG).scatter_(1, kept, 1) + _sum(score_OMG - score_OMG).unsqueeze(
        1
    )


def sampled_mask(mask_logits: torch.Tensor, site: Site, sample: Sample) -> torch.Tensor:
    """The mask of one draw, (O, I): soft, or the N largest of each group when ``sample.hard``."""
    score = scores(mask_logits, site, sample)
    return _in_rows(largest(score, site.pattern) if sample.hard else marginals(score, site.pattern))


def _in_rows(mask_OMG: torch.Tensor) -> torch.Tensor:
    return mask_OMG.transpose(1, 2).flatten(1)


def forward(
    mask_logits: torch.Tensor,
    weight: torch.Tensor,
    site: Site,
    sample: Sample,
    statistics: bool = False,
) -> Sampled:
    """Sample a mask and apply it to the weight."""
    mask = sampled_mask(mask_logits.to(computing_dtype(mask_logits)), site, sample)
    about = mask_statistics(mask_logits, site, sample.kappa) if statistics else None
    return Sampled.of(mask, weight, site, about)


def backward(
    grad: torch.Tensor,
    mask_logits: torch.Tensor,
    weight: torch.Tensor,
    site: Site,
    sample: Sample,
    sink: GradientSink = RETURNED,
) -> torch.Tensor:
    """Gradient at the logits, (O, M, G), of ``grad``, the gradient at W * M; the noise is drawn
    again.

    With dW the gradient at W * M:

        dM = dW * W - 2 norm_coef W^2 * M
        dpi = kappa / tau * dl
    """
    wide = computing_dtype(mask_logits)
    score = scores(mask_logits.to(wide), site, sample)
    mask = _in_rows(largest(score, site.pattern) if sample.hard else marginals(score, site.pattern))
    weight, grad = weight.to(wide), grad.to(wide)
    dmask = grad * weight - 2 * sink.norm_coef * weight.square() * mask
    slope = dmask.unflatten(1, (-1, site.pattern.m)).transpose(1, 2)
    dlogits = sample.kappa / sample.tau * covariances(score, slope, site.pattern)
    return sink.put(dlogits, mask_logits.dtype)


def mask_statistics(
    mask_logits: torch.Tensor, site: Site, kappa: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(hard codes (O, G), bit j = position j is kept; sum over groups of the largest probability of
    a candidate, 0-d). Draws no noise.
    """
    mask_logits = mask_logits.to(computing_dtype(mask_logits))
    bit = 2 ** torch.arange(site.pattern.m, device=mask_logits.device)
    kept = mask_logits.argsort(dim=1, descending=True, stable=True)[:, : site.pattern.n]
    hard_codes = bit[kept].sum(1)  # int64; the cast keeps the low bits
    return hard_codes.to(site.code_dtype), (1 / _whole(mask_logits * kappa, site.pattern)).sum(
        dtype=torch.float64
    )


def subset_entropy(score_OMG: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Entropy, in nats, of P(S) ~ exp(sum of scores), (O, G): log of the sum over S minus the mean
    score.
    """
    best = score_OMG.sort(dim=1, descending=True).values[:, : pattern.n].sum(1)
    return (
        _whole(score_OMG, pattern).log() + best - (marginals(score_OMG, pattern) * score_OMG).sum(1)
    )


def _whole(score_OMG: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Sum over all sets S of exp(sum of scores), in units of the largest, (O, G)."""
    law = factors(score_OMG, pattern)
    product = _one(law.u[0], law.size)
    for u, v in zip(law.u, law.v, strict=True):
        product = _times(product, u, v)
    return product[law.size]
