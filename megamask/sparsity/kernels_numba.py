"""Fused sampling of the relaxed categorical on CPUs: one pass over logits and weights, noise made in registers.

Every float operation is a plain IEEE multiply, add or divide in a fixed order (no fast-math, no library log or exp), so a
group's mask does not depend on where the group lies: ranks, threads and vector lanes all give the same bits.
Needs numba only, no C compiler. A kernel runs on one thread without the GIL; fused_cpu.py gives each thread a slice of the rows. (Of
numba's own thread layers, OpenMP kills a process that forks, as checkpoint writers do, and the work queue scaled poorly.)

Shapes: O rows, G groups per row, C candidates, M group size, I = G * M. Weights travel as raw bits: uint16 for bf16,
uint32 for fp32.
"""

# numba's decorators carry no types
# mypy: disable-error-code="misc,untyped-decorator"

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import njit, types
from numba.extending import intrinsic


def _wide_vectors() -> None:
    """LLVM uses half of AVX-512's width unless told otherwise; these kernels are arithmetic enough to want all of it."""
    features = get_host_cpu_features()
    if features.get("avx512f") and not numba.config.CPU_FEATURES:
        numba.config.CPU_FEATURES = f"{features.flatten()},-prefer-256-bit"


_wide_vectors()

_F = np.float32
_ONE, _HALF, _ZERO = _F(1), _F(0.5), _F(0)


@intrinsic
def _float_of(typing_context: Any, bits: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), build


@intrinsic
def _bits_of(typing_context: Any, value: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), build


@njit(inline="always")
def _log(x):  # type: ignore[no-untyped-def]
    """Natural log of a positive normal fp32 (Cephes logf: 1 ulp-ish, relative near 1)."""
    bits = _bits_of(_F(x))
    exponent = _F(np.int32(bits >> np.uint32(23))) - _F(126)
    m = _float_of(np.uint32((bits & np.uint32(0x7FFFFF)) | np.uint32(0x3F000000)))
    small = m < _F(0.707106781186547524)
    exponent = exponent - _ONE if small else exponent
    x = m + m - _ONE if small else m - _ONE
    z = x * x
    y = _F(7.0376836292e-2)
    y = y * x - _F(1.1514610310e-1)
    y = y * x + _F(1.1676998740e-1)
    y = y * x - _F(1.2420140846e-1)
    y = y * x + _F(1.4249322787e-1)
    y = y * x - _F(1.6668057665e-1)
    y = y * x + _F(2.0000714765e-1)
    y = y * x - _F(2.4999993993e-1)
    y = y * x + _F(3.3333331174e-1)
    y = y * x * z
    y = y + exponent * _F(-2.12194440e-4)
    y = y - _HALF * z
    return x + y + exponent * _F(0.693359375)


@njit(inline="always")
def _exp(x):  # type: ignore[no-untyped-def]
    """exp of a non-positive fp32, 0 below -86, NaN of NaN (Cephes expf)."""
    clipped = _F(-86) if x < _F(-86) else x
    power = np.int32(clipped * _F(1.44269504088896341) - _HALF)
    n = _F(power)
    r = clipped - n * _F(0.693359375)
    r = r - n * _F(-2.12194440e-4)
    y = _F(1.9875691500e-4)
    y = y * r + _F(1.3981999507e-3)
    y = y * r + _F(8.3334519073e-3)
    y = y * r + _F(4.1665795894e-2)
    y = y * r + _F(1.6666665459e-1)
    y = y * r + _F(5.0000001201e-1)
    y = y * (r * r) + r + _ONE
    scaled = y * _float_of(np.uint32(np.uint32(power + np.int32(127)) << np.uint32(23)))
    return _ZERO if x < _F(-86) else scaled


@njit(inline="always")
def _mix(g, high, block, parameter, micro_batch, seed, step):  # type: ignore[no-untyped-def]
    """Philox4x32-10; the layout of the counter is the one in philox.py."""
    low32 = np.uint64(0xFFFFFFFF)
    c0, c1 = g & low32, (high << np.uint64(8)) | block
    c2, c3 = parameter, micro_batch
    k0, k1 = seed, step
    for _ in range(10):
        p0 = c0 * np.uint64(0xD2511F53)
        p1 = c2 * np.uint64(0xCD9E8D57)
        c0 = (p1 >> np.uint64(32)) ^ c1 ^ k0
        c1 = p1 & low32
        c2 = (p0 >> np.uint64(32)) ^ c3 ^ k1
        c3 = p0 & low32
        k0 = (k0 + np.uint64(0x9E3779B9)) & low32
        k1 = (k1 + np.uint64(0xBB67AE85)) & low32
    return c0, c1, c2, c3


@njit(inline="always")
def _probabilities(y, top, logits, word, first, groups, candidates, kappa, inverse_tau, key):  # type: ignore[no-untyped-def]
    """Fill ``y`` (C, G) with the relaxed sample of one row whose first group has global id ``first``."""
    seed, step, micro_batch, parameter = key
    for block in range((candidates + 3) // 4):
        for g in range(groups):
            group = first + np.uint64(g)
            w0, w1, w2, w3 = _mix(group, group >> np.uint64(32), np.uint64(block), parameter, micro_batch, seed, step)
            word[4 * block, g] = np.uint32(w0)
            word[4 * block + 1, g] = np.uint32(w1)
            word[4 * block + 2, g] = np.uint32(w2)
            word[4 * block + 3, g] = np.uint32(w3)
    for c in range(candidates):
        for g in range(groups):
            u = (_F(np.int32(word[c, g] >> np.uint32(9))) + _HALF) * _F(2.0**-23)
            y[c, g] = (logits[c, g] * kappa - _log(-_log(u))) * inverse_tau
    _softmax(y, top, groups, candidates)


@njit(inline="always")
def _softmax(y, top, groups, candidates):  # type: ignore[no-untyped-def]
    """Softmax over the first axis of (C, G), in place; ``top`` (G,) is scratch."""
    for g in range(groups):
        top[g] = y[0, g]
    for c in range(1, candidates):
        for g in range(groups):
            top[g] = max(top[g], y[c, g])
    for c in range(candidates):
        for g in range(groups):
            y[c, g] = _exp(y[c, g] - top[g])
    for g in range(groups):
        top[g] = y[0, g]
    for c in range(1, candidates):
        for g in range(groups):
            top[g] += y[c, g]
    for g in range(groups):
        top[g] = _ONE / top[g]
    for c in range(candidates):
        for g in range(groups):
            y[c, g] *= top[g]


@njit(inline="always")
def _mix_masks(mask, y, kept, groups, candidates, members, m, hard):  # type: ignore[no-untyped-def]
    """mask (M, G) = y (C, G) through the candidate table (MaskLLM, Eq. 7); hard takes the largest y alone."""
    for j in range(m):
        for g in range(groups):
            mask[j, g] = _ZERO
    if hard:
        for g in range(groups):
            winner = 0
            for c in range(1, candidates):
                if y[c, g] > y[winner, g]:
                    winner = c
            for k in range(members):
                mask[kept[winner, k], g] = _ONE
    else:
        for c in range(candidates):
            for k in range(members):
                j = kept[c, k]
                for g in range(groups):
                    mask[j, g] += y[c, g]


@njit(inline="always")
def _round_bf16(value):  # type: ignore[no-untyped-def]
    bits = _bits_of(value)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(nogil=True, cache=True, error_model="numpy")  # 0 / 0 is NaN, not an exception: the step refuses it by name
def forward(out, norm, logits, weight, kept, m, place, key, kappa, inverse_tau, hard):  # type: ignore[no-untyped-def]
    """out (O, I) = weight * sampled mask; norm (O,) fp64 = sum of its squares per row.

    place = (global id of the first row, global id of the first column group, groups in a whole row).
    """
    rows, candidates, groups = logits.shape
    members = kept.shape[1]
    wide = weight.itemsize == 4
    for o in range(rows):
        y, top = np.empty((candidates, groups), np.float32), np.empty(groups, np.float32)
        word = np.empty((4 * ((candidates + 3) // 4), groups), np.uint32)
        mask = np.empty((m, groups), np.float32)
        first = np.uint64(place[0] + o) * np.uint64(place[2]) + np.uint64(place[1])
        _probabilities(y, top, logits[o], word, first, groups, candidates, kappa, inverse_tau, key)
        _mix_masks(mask, y, kept, groups, candidates, members, m, hard)
        total = 0.0
        for g in range(groups):
            for j in range(m):
                if wide:
                    masked = _float_of(np.uint32(weight[o, g * m + j])) * mask[j, g]
                    out[o, g * m + j] = _bits_of(masked)
                else:
                    masked = _float_of(np.uint32(weight[o, g * m + j]) << np.uint32(16)) * mask[j, g]
                    out[o, g * m + j] = _round_bf16(masked)
                total += masked * masked
        norm[o] = total


@njit(nogil=True, cache=True, error_model="numpy")  # 0 / 0 is NaN, not an exception: the step refuses it by name
def backward(dlogits, grad, logits, weight, kept, m, place, key, kappa, inverse_tau, hard, norm_coef):  # type: ignore[no-untyped-def]
    """dlogits (O, C, G) of grad (O, I), the gradient at the masked weight, minus norm_coef * |W * M|^2; the noise is drawn again."""
    rows, candidates, groups = logits.shape
    members = kept.shape[1]
    wide = weight.itemsize == 4
    for o in range(rows):
        y, top = np.empty((candidates, groups), np.float32), np.empty(groups, np.float32)
        word = np.empty((4 * ((candidates + 3) // 4), groups), np.uint32)
        mask = np.empty((m, groups), np.float32)
        mean = np.empty(groups, np.float32)
        first = np.uint64(place[0] + o) * np.uint64(place[2]) + np.uint64(place[1])
        _probabilities(y, top, logits[o], word, first, groups, candidates, kappa, inverse_tau, key)
        _mix_masks(mask, y, kept, groups, candidates, members, m, hard)
        for g in range(groups):
            for j in range(m):
                if wide:
                    w = _float_of(np.uint32(weight[o, g * m + j]))
                    d = _float_of(np.uint32(grad[o, g * m + j]))
                else:
                    w = _float_of(np.uint32(weight[o, g * m + j]) << np.uint32(16))
                    d = _float_of(np.uint32(grad[o, g * m + j]) << np.uint32(16))
                mask[j, g] = d * w - _F(2) * norm_coef * w * w * mask[j, g]
        for g in range(groups):
            mean[g] = _ZERO
        for c in range(candidates):
            score = dlogits[o, c]
            for g in range(groups):
                score[g] = mask[kept[c, 0], g]
            for k in range(1, members):
                j = kept[c, k]
                for g in range(groups):
                    score[g] += mask[j, g]
            for g in range(groups):
                mean[g] += y[c, g] * score[g]
        slope = kappa * inverse_tau
        for c in range(candidates):
            score = dlogits[o, c]
            for g in range(groups):
                score[g] = slope * y[c, g] * (score[g] - mean[g])


@njit(nogil=True, cache=True, error_model="numpy")  # 0 / 0 is NaN, not an exception: the step refuses it by name
def survey(winner, max_prob, logits, kappa):  # type: ignore[no-untyped-def]
    """winner (O, G) uint8 = argmax over candidates; max_prob (O,) fp64 = row sums of the largest probability, no noise."""
    rows, candidates, groups = logits.shape
    for o in range(rows):
        top = np.empty(groups, np.float32)
        total_exp = np.zeros(groups, np.float32)
        best = np.zeros(groups, np.int32)
        for g in range(groups):
            top[g] = logits[o, 0, g]
        for c in range(1, candidates):
            for g in range(groups):
                better = logits[o, c, g] > top[g]
                best[g] = np.int32(c) if better else best[g]
                top[g] = max(top[g], logits[o, c, g])
        for c in range(candidates):
            for g in range(groups):
                total_exp[g] += _exp((logits[o, c, g] - top[g]) * kappa)
        total = 0.0
        for g in range(groups):
            winner[o, g] = np.uint8(best[g])
            total += _ONE / total_exp[g]
        max_prob[o] = total
