"""The linear distribution in plain PyTorch: one logit per weight, any N:M, exact marginals; the
readable reference of every backend.

A candidate's logit is the sum of its members' logits. A draw adds one Gumbel g to every member's
score, l = (kappa pi + g) / tau. The soft mask is the exact inclusion probability of every member
under P(S) ~ exp(sum_{i in S} l_i) over the sets S of N of the M members; it sums to N and tends to
the N largest l as tau falls. The hard mask is those N largest.

Which law is drawn: keeping the N largest of kappa pi + g draws N members one after the other
without replacement, each with probability ~ exp(kappa pi) among those left (Plackett-Luce, Gumbel
top-N). Perturbing candidates, as gumbel_softmax.py does, would draw P(S) ~ exp(kappa sum_{i in S}
pi_i). These are different laws (for N = 1 they are one); both have their mode at the N largest
logits, the winners. ``mask_statistics`` reports the second law, which no noise enters.

Marginals. Let t lie midway between the N-th and the next largest l. A member's factor 1 + e^(l - t)
z, divided by the larger of its two terms, is u + v z with {u, v} = {1, e^-|l - t|}. With P_j[c] the
coefficient of z^c in the product of the factors before j, S_j[c] in that from j on:

    A = sum_c P_j[c] S_{j+1}[N - 1 - c],  B = sum_c P_j[c] S_{j+1}[N - c]   (sets of N - 1, of N
    other members) m_j = v_j A / (v_j A + u_j B)

Nothing is subtracted, no term overflows, and the denominator is at least 1: of the best set every
factor's term is 1, so that A >= 1 for a kept member and B >= 1 for any other. What underflows is
smaller than the smallest fp32, at any tau. For N > M/2 the M - N members left out are drawn
instead, which swaps u with v: fewer coefficients.

Gradient. dl_j = Cov(1_j, sum_i d_i 1_i) of the candidate law, d = dM: with PQ, SQ the sums of w(S)
d(S) where P, S have those of w(S), and Q_A, Q_B the same of A, B, it is u_j v_j (d_j A B + Q_A B -
Q_B A) / (v_j A + u_j B)^2: m_j (1 - m_j) times the difference of the expected sums of d with j and
without.

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
    gumbel_noise,
)
from megamask.sparsity.pattern import Pattern


class Factors(NamedTuple):
    """u + v z of every member: lists over M of (O, G), and the size K of the sets that z counts."""

    u: list[torch.Tensor]
    v: list[torch.Tensor]
    size: int


def scores(mask_logits: torch.Tensor, site: Site, sample: Sample) -> torch.Tensor:
    """l = (kappa pi + g) / tau, (O, M, G)."""
    noise = gumbel_noise(site, sample, mask_logits.shape[-1], mask_logits.device, mask_logits.dtype)
    return (mask_logits * sample.kappa + noise) / sample.tau


def factors(score_OMG: torch.Tensor, pattern: Pattern) -> Factors:
    """Factors that are 1 in the best set's term; NaN throughout a group that holds a score that is
    not finite.
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
    """``poly`` (sums of w(S)) and ``sums`` (of w(S) d(S)) with one more member."""
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
    """Probability that each member is in S, P(S) ~ exp(sum of scores), (O, M, G)."""
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
    """Covariance of each member's presence with the sum of ``slope`` over S, (O, M, G): the
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
    """0/1 mask, (O, M, G), of the N largest scores; ties go to the earlier member; NaN where a
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
    wide = computing_dtype(mask_logits)
    masked = weight.to(wide) * sampled_mask(mask_logits.to(wide), site, sample)
    norm, nothing = (
        masked.square().sum(dtype=torch.float64),
        torch.zeros((), dtype=torch.float64, device=masked.device),
    )
    hard_codes, top = (
        mask_statistics(mask_logits, site, sample.kappa)
        if statistics
        else (nothing.new_empty(0, dtype=site.code_dtype), nothing)
    )
    return Sampled(masked.to(weight.dtype), torch.stack([norm, top]), hard_codes)


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

    dM = dW * W - 2 norm_coef W^2 * M and dpi = kappa / tau * dl. Added to ``into`` (fp32 or bf16)
    when given, which is then returned.
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
    """(winners (O, G) as bits of their members, sum over groups of the largest probability of a
    candidate, 0-d). Draws no noise.
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
