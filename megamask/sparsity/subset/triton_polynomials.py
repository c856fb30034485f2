"""Ranks, and polynomials of the weights of sets, on tiles of groups: what the k-subset kernels for
Triton share.

A polynomial is a tuple of coefficients from degree 0 on. ``sums`` (of w(S) d(S)) starts at degree
1, because the coefficient of the empty set is 0.

A helper that takes two tuples is told the length of the first. Triton 3.6 names a helper's code by
the types of its arguments in a row, without the borders of tuples: a call with tuples of one and
two would meet the code for tuples of two and one.

Shapes: M positions, which may be those of a part of a group; tensors are tiles.
"""

# triton's decorators carry no types, and its annotations are values, not types
# mypy: ignore-errors

import triton
import triton.language as tl

from megamask.sparsity.kernels.triton_tiles import exp


@triton.jit
def ranks_of(values, M: tl.constexpr):
    """How many positions come before each, the largest first, the earlier of equals first."""
    ranks = ()
    for j in tl.static_range(M):
        before = tl.zeros(values[j].shape, tl.int32)
        for i in tl.static_range(M):
            if i < j:
                before += (values[i] >= values[j]).to(tl.int32)
            if i > j:
                before += (values[i] > values[j]).to(tl.int32)
        ranks = ranks + (before,)
    return ranks


@triton.jit
def not_finite(values, M: tl.constexpr):
    """0, or NaN in a group with a value that is not finite."""
    bad = values[0] - values[0]
    for j in tl.static_range(1, M):
        bad += values[j] - values[j]
    return bad


@triton.jit
def middle_of(scores, ranks, N: tl.constexpr, M: tl.constexpr):
    """What these positions add to the number midway between the N-th largest score and the next;
    NaN in a group with a score that is not finite.
    """
    middle = not_finite(scores, M)
    for j in tl.static_range(M):
        middle += tl.where((ranks[j] == N - 1) | (ranks[j] == N), 0.5 * scores[j], 0.0)
    return middle


@triton.jit
def factors_of(scores, middle, OTHERS: tl.constexpr, M: tl.constexpr):
    """u + v z of every position, for the sets of those kept or, with OTHERS, of those left out."""
    u, v = (), ()
    for j in tl.static_range(M):
        distance = scores[j] - middle
        small = exp(-tl.abs(distance))
        u = u + (tl.where(distance > 0, small, 1.0),)
        v = v + (tl.where(distance > 0, 1.0, small),)
    if OTHERS:
        u, v = v, u
    return u, v


@triton.jit
def hard_masks(ranks, bad, N: tl.constexpr, M: tl.constexpr):
    """1 for the N largest, else 0; NaN where ``bad`` is."""
    masks = ()
    for j in tl.static_range(M):
        masks = masks + (tl.where(ranks[j] < N, 1.0, 0.0) + bad,)
    return masks


@triton.jit
def times(poly, u, v, K: tl.constexpr):
    """``poly`` times u + v z, without what exceeds K."""
    product = (u * poly[0],)
    for c in tl.static_range(1, len(poly)):
        product = product + (tl.fma(u, poly[c], v * poly[c - 1]),)
    if len(poly) <= K:
        product = product + (v * poly[len(poly) - 1],)
    return product


@triton.jit
def sums_times(poly, sums, u, v, d, K: tl.constexpr, LENGTH: tl.constexpr):
    """The sums with one more position; LENGTH is that of ``poly``."""
    product = ()
    for c in tl.static_range(1, LENGTH + 1):
        if c <= K:
            term = d * poly[c - 1]
            if c > 1:
                term = tl.fma(d, poly[c - 1], sums[c - 2])
            term = v * term
            if c <= len(sums):
                term = tl.fma(u, sums[c - 1], term)
            product = product + (term,)
    return product


@triton.jit
def coefficient(a, b, degree: tl.constexpr, FIRST: tl.constexpr, like, LENGTH: tl.constexpr):
    """That of z^degree in a b; the degrees of ``b`` start at FIRST, and LENGTH is that of ``a``."""
    total = tl.zeros(like.shape, tl.float32)
    for c in tl.static_range(LENGTH):
        if degree - c >= FIRST and degree - c < len(b) + FIRST:
            total = tl.fma(a[c], b[degree - c - FIRST], total)
    return total


@triton.jit
def suffixes_of(u, v, K: tl.constexpr, M: tl.constexpr):
    """Products of the last 0 .. M - 1 factors."""
    suffix = (tl.full(u[0].shape, 1.0, tl.float32),)
    found = (suffix,)
    for j in tl.static_range(1, M):
        suffix = times(suffix, u[M - j], v[M - j], K)
        found = found + (suffix,)
    return found


@triton.jit
def product_of(u, v, K: tl.constexpr, M: tl.constexpr):
    """That of all factors."""
    result = (tl.full(u[0].shape, 1.0, tl.float32),)
    for j in tl.static_range(M):
        result = times(result, u[j], v[j], K)
    return result
