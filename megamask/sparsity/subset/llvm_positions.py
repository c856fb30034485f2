"""Moves weights between memory and vector registers for the subset kernels, and masks them on the
way, as LLVM instructions.

In memory the M weights of a group are neighbours: (g0 p0, g0 p1, .., g1 p0, ..). The polynomials of
llvm_polynomials.py work on one vector for each position, with LANES groups side by side. ``read``
and ``write`` convert between the two by shuffles. A compiler left to itself reads such strided
lines one number at a time, which took four times as long.

Weights, gradients and results are raw bits of 1-d arrays: uint16 for bf16, uint32 for fp32. Two
bf16 positions share a 32-bit word where M is even. ``mask``, ``square`` and the arguments of the
intrinsics are as in llvm_polynomials.py.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from megamask.sparsity.subset.llvm_polynomials import LANES, Block, Vector, emit

_WORD = ir.IntType(32)
_WORDS = ir.VectorType(_WORD, LANES)
_UPPER = 0xFFFF0000


class _Positions(Block):
    """Reads and writes LANES groups of a 1-d array, from group ``g`` on."""

    def read(self, argument: int) -> list[Vector]:
        """M vectors of fp32, one for each position; a lane is a group."""
        # Words as they lie in memory: 32 bits, or 16 where a group is no whole number of words.
        units, halves = self._units(argument), self.signature.args[argument].dtype.bitwidth == 16
        per_group = len(units)
        positions = []
        for k in range(per_group):
            # Word k of every group.
            lanes = _pick(self.builder, units, [lane * per_group + k for lane in range(LANES)])
            if not halves:
                positions.append(lanes)
            elif per_group == self.m:  # a word is one bf16
                positions.append(self.builder.shl(self.builder.zext(lanes, _WORDS), _all(16)))
            else:  # a word is two bf16, the lower half first
                positions += [
                    self.builder.shl(lanes, _all(16)),
                    self.builder.and_(lanes, _all(_UPPER)),
                ]
        return [self.builder.bitcast(position, self.type) for position in positions]

    def write(self, positions: list[Vector], argument: int) -> None:
        """The inverse of ``read``; bf16 is rounded to nearest even."""
        pointers, units = (
            self._pointers(argument),
            [self.builder.bitcast(position, _WORDS) for position in positions],
        )
        # Round to bf16, and put two positions in a word.
        if self.signature.args[argument].dtype.bitwidth == 16:
            units = [
                self._upper_half(position, bits)
                for position, bits in zip(positions, units, strict=True)
            ]
            if len(pointers) == self.m:
                units = [self.builder.trunc(unit, pointers[0].type.pointee) for unit in units]
            else:
                units = [
                    self.builder.or_(low, self.builder.shl(high, _all(16)))
                    for low, high in zip(units[::2], units[1::2], strict=True)
                ]
        # Interleave: element ``at`` in memory is word at % count of group at // count.
        count = len(units)
        for number, pointer in enumerate(pointers):
            flat = range(number * LANES, (number + 1) * LANES)
            self.builder.store(
                _pick(self.builder, units, [at % count * LANES + at // count for at in flat]),
                pointer,
                align=2,
            )

    def _units(self, argument: int) -> list[Vector]:
        return [self.builder.load(pointer, align=2) for pointer in self._pointers(argument)]

    def _pointers(self, argument: int) -> list[Any]:
        """Addresses of the vectors of words that hold the LANES groups."""
        bits = self.signature.args[argument].dtype.bitwidth
        unit = bits if self.m * bits % 32 else 32
        kind = ir.VectorType(ir.IntType(unit), LANES)
        array = self.context.make_array(self.signature.args[argument])(
            self.context, self.builder, self.arguments[argument]
        )
        group = self.builder.mul(self.arguments[-1], self.arguments[-1].type(self.m * bits // 8))
        first = cgutils.pointer_add(self.builder, array.data, group, return_type=kind.as_pointer())
        return [self.builder.gep(first, [_WORD(number)]) for number in range(self.m * bits // unit)]

    def _upper_half(self, value: Vector, bits: Vector) -> Vector:
        """``round_bf16`` of numba_math.py, in the lower half of each word."""
        shift, builder = _all(16), self.builder
        even = builder.and_(builder.lshr(bits, shift), _all(1))
        rounded = builder.lshr(builder.add(builder.add(bits, _all(0x7FFF)), even), shift)
        return builder.select(builder.fcmp_unordered("uno", value, value), _all(0x7FC0), rounded)


def _all(value: int) -> Vector:
    return ir.Constant(_WORDS, [value] * LANES)


def _pick(builder: Any, vectors: list[Vector], flat: list[int]) -> Vector:
    """A vector of the elements with the numbers ``flat``, counted through all of ``vectors``.

    A shuffle takes two vectors, so the vectors are gone through in pairs and merged.
    """
    nothing, chosen = ir.Constant(vectors[0].type, ir.Undefined), None
    for first in range(0, len(vectors), 2):
        local = [at - first * LANES for at in flat]
        here = [0 <= at < 2 * LANES for at in local]
        if any(here):
            second = vectors[first + 1] if first + 1 < len(vectors) else nothing
            taken = [at if is_here else 0 for at, is_here in zip(local, here, strict=True)]
            part = builder.shuffle_vector(vectors[first], second, _lanes(taken))
            merge = [LANES + lane if is_here else lane for lane, is_here in enumerate(here)]
            chosen = part if chosen is None else builder.shuffle_vector(chosen, part, _lanes(merge))
    return chosen


def _lanes(numbers: list[int]) -> Any:
    return ir.Constant(_WORDS, numbers)


@intrinsic
def apply_mask(
    typing_context: Any,
    kept: Any,
    positions: Any,
    out: Any,
    square: Any,
    weight: Any,
    mask: Any,
    g: Any,
) -> Any:
    """out = weight * mask; square (G,) = the sum of squares of each group."""

    def write(block: _Positions) -> None:
        masked = [
            block.builder.fmul(w, share)
            for w, share in zip(block.read(4), block.lines(5), strict=True)
        ]
        total = None
        for product in masked:
            total = block.add_product(product, product, total)
        block.write(masked, 2)
        block.store(total, 3)

    return types.void(kept, positions, out, square, weight, mask, g), emit(write, _Positions)


@intrinsic
def gradient_at_mask(
    typing_context: Any,
    kept: Any,
    positions: Any,
    mask: Any,
    grad: Any,
    weight: Any,
    coef: Any,
    g: Any,
) -> Any:
    """mask (M, G) becomes dM = W * (dW - coef W * M)."""

    def write(block: _Positions) -> None:
        builder = block.builder
        one = builder.insert_element(
            ir.Constant(block.type, ir.Undefined), builder.fneg(block.arguments[5]), _WORD(0)
        )
        negative = builder.shuffle_vector(one, one, ir.Constant(_WORDS, [0] * LANES))
        for j, (share, d, w) in enumerate(
            zip(block.lines(2), block.read(3), block.read(4), strict=True)
        ):
            block.store(builder.fmul(w, block.fma(builder.fmul(negative, w), share, d)), 2, j)

    return types.void(kept, positions, mask, grad, weight, coef, g), emit(write, _Positions)
