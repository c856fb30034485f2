"""Arithmetic of the fused CPU kernels: log2, exp2, bf16 rounding and Philox, on lanes of a vector.

Every float operation is one IEEE operation in a fixed order (an explicit fused multiply-add, no
fast-math, no library log or exp), so a result does not depend on where a group lies: ranks, threads
and vector lanes all give the same bits.
"""

# numba's decorators carry no types
# mypy: disable-error-code="misc,untyped-decorator,no-untyped-def"

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic


def _wide_vectors() -> None:
    """LLVM uses half of AVX-512's width unless told otherwise; these kernels are arithmetic enough
    to want all of it.
    """
    features = get_host_cpu_features()
    if features.get("avx512f") and not numba.config.CPU_FEATURES:
        numba.config.CPU_FEATURES = f"{features.flatten()},-prefer-256-bit"


PACKAGE = Path(__file__).resolve().parents[2]
# Kernels inline functions of each other, and the constants of MaskPro's score.
SOURCES = ("*_numba.py", "numba_*.py", "llvm_*.py", "score.py")


def cache_folder(package: Path) -> Path:
    """The folder that keeps the compiled kernels of exactly these sources.

    numba looks at the time stamp of a kernel's own file alone. It would go on using a compiled
    kernel after a function that the kernel inlines from another file has changed.
    """
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in package.rglob(pattern)}):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return package / "__pycache__" / f"numba-{digest.hexdigest()[:12]}"


_wide_vectors()
if not numba.config.CACHE_DIR:
    numba.config.CACHE_DIR = str(cache_folder(PACKAGE))

IS_X86 = platform.machine() in ("x86_64", "AMD64")
FLUSH = 0x8040  # of x86's floating-point control word: results and operands
F = np.float32
U32 = np.uint32
U64 = np.uint64


@intrinsic
def float_of(typing_context: Any, bits: Any) -> Any:
    """The fp32 with these 32 bits."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), build


@intrinsic
def bits_of(typing_context: Any, value: Any) -> Any:
    """The 32 bits of an fp32."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), build


@intrinsic
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c with one rounding."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), build


@intrinsic
def _prefetch(typing_context: Any, address: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        into_l1 = [
            ir.Constant(number, value) for value in (0, 3, 1)
        ]  # to read, in every cache, data
        builder.call(function, [builder.inttoptr(arguments[0], pointer), *into_l1])
        return context.get_dummy_value()

    return types.void(types.uintp), build


@njit(inline="always")
def prefetch(line, start, count):
    """Ask for ``count`` elements of a contiguous array (flat index ``start``), so that they arrive
    while something else is computed.
    """
    begin = line.ctypes.data + start * line.itemsize
    for offset in range(0, count * line.itemsize, 64):
        _prefetch(np.uintp(begin + offset))


def _control(builder: Any, operation: str, place: Any) -> None:
    """Store (``stmxcsr``) or load (``ldmxcsr``) the control word of x86 floating point; nothing on
    other processors.
    """
    if IS_X86:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer()])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.sse.{operation}")
        builder.call(function, [builder.bitcast(place, ir.IntType(8).as_pointer())])


@intrinsic
def flush_denormals(typing_context: Any) -> Any:
    """Let this thread take numbers below 2^-126 for 0, until ``restore`` gets the result of this
    call.

    Such numbers mean nothing here, but arithmetic with them is slow: samples at a low temperature
    make many, and took up to 40 times as long.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = cgutils.alloca_once_value(builder, ir.IntType(32)(0))
        _control(builder, "stmxcsr", place)
        before = builder.load(place)
        builder.store(builder.or_(before, ir.IntType(32)(FLUSH)), place)
        _control(builder, "ldmxcsr", place)
        return before

    return types.uint32(), build


@intrinsic
def restore(typing_context: Any, before: Any) -> Any:
    """Undo ``flush_denormals``."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _control(builder, "ldmxcsr", cgutils.alloca_once_value(builder, arguments[0]))
        return context.get_dummy_value()

    return types.void(types.uint32), build


@njit(inline="always")
def log2_split(x):
    """(m - 1, e) with x = m 2^e and sqrt(1/2) <= m < sqrt(2), of a positive normal fp32."""
    bits = bits_of(x)
    exponent = np.int32(bits - U32(0x3F3504F3)) >> np.int32(23)
    mantissa = float_of(bits - U32(exponent << np.int32(23)))
    return mantissa - F(1), F(exponent)


@njit(inline="always")
def log2(x):
    """log2 of a positive normal fp32, relative error 1e-7 also near 1 (minimax polynomial of degree
    8).
    """
    t, e = log2_split(x)
    y = fma(F(0.12614846229553223), t, F(-0.20742103457450867))
    y = fma(y, t, F(0.21566985547542572))
    y = fma(y, t, F(-0.23892034590244293))
    y = fma(y, t, F(0.2879183292388916))
    y = fma(y, t, F(-0.36070483922958374))
    y = fma(y, t, F(0.48091059923171997))
    y = fma(y, t, F(-0.7213473320007324))
    y = fma(y, t, F(1.4426950216293335))
    return fma(t, y, e)


@njit(inline="always")
def log2_short(x):
    """log2 of a positive normal fp32, absolute error 1.4e-7 or a rounding (degree 7): for logs that
    are only added to something.
    """
    t, e = log2_split(x)
    y = fma(F(-0.14620353281497955), t, F(0.2342098504304886))
    y = fma(y, t, F(-0.24882180988788605))
    y = fma(y, t, F(0.28707560896873474))
    y = fma(y, t, F(-0.36024197936058044))
    y = fma(y, t, F(0.4809240400791168))
    y = fma(y, t, F(-0.721352756023407))
    y = fma(y, t, F(1.442694902420044))
    return fma(t, y, e)


@njit(inline="always")
def exp2(x):
    """2^x of a non-positive fp32, relative error 2.4e-7 (degree 5); 0 below -125, NaN of NaN."""
    clipped = F(-125) if x < F(-125) else x
    shifted = clipped + F(12582912)  # 1.5 * 2^23: the nearest integer is in the low bits
    r = clipped - (shifted - F(12582912))
    y = fma(F(0.0013400432653725147), r, F(0.009676037356257439))
    y = fma(y, r, F(0.05550327152013779))
    y = fma(y, r, F(0.2402210682630539))
    y = fma(y, r, F(0.6931471824645996))
    y = fma(y, r, F(1))
    power = y * float_of((bits_of(shifted) + U32(127)) << U32(23))
    return F(0) if x < F(-125) else power


@njit(inline="always")
def uniform(word):
    """fp32 in (0, 1) of a 32-bit word, the value of ``noise.uniform``: (23 high bits + 1/2) /
    2^23, exact.
    """
    return float_of((word >> U32(9)) | U32(0x3F800000)) - F(1 - 2.0**-24)


@njit(inline="always")
def round_bf16(value):
    """``value`` rounded to nearest even bf16, in the upper half of the 32 bits returned; the
    lower half means nothing. NaN stays NaN.
    """
    bits = bits_of(value)
    rounded = bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))
    return U32(0x7FC00000) if value != value else rounded


@njit(inline="always")
def mix(g, high, block, parameter, micro_batch, seed, step):
    """Philox4x32-10; the layout of the counter is the one in noise.py."""
    low32 = U64(0xFFFFFFFF)
    c0, c1 = g & low32, (high << U64(8)) | block
    c2, c3 = parameter, micro_batch
    k0, k1 = seed, step
    for _ in range(10):
        p0 = c0 * U64(0xD2511F53)
        p1 = c2 * U64(0xCD9E8D57)
        c0 = (p1 >> U64(32)) ^ c1 ^ k0
        c1 = p1 & low32
        c2 = (p0 >> U64(32)) ^ c3 ^ k1
        c3 = p0 & low32
        k0 = (k0 + U64(0x9E3779B9)) & low32
        k1 = (k1 + U64(0xBB67AE85)) & low32
    return c0, c1, c2, c3


@njit(inline="always")
def fill_words(word, first, groups, key):
    """word (4 B, G) uint32: the noise of ``groups`` groups from global id ``first``; key = (seed,
    step, micro-batch, parameter).
    """
    seed, step, micro_batch, parameter = key
    for block in range(word.shape[0] // 4):
        for g in range(groups):
            group = first + U64(g)
            w0, w1, w2, w3 = mix(
                group, group >> U64(32), U64(block), parameter, micro_batch, seed, step
            )
            word[4 * block, g] = U32(w0)
            word[4 * block + 1, g] = U32(w1)
            word[4 * block + 2, g] = U32(w2)
            word[4 * block + 3, g] = U32(w3)
