"""Polynomials of the k-subset distribution in registers: LLVM instructions for LANES groups at a
time, unrolled for one N:M.

k_subset.py has the maths, and the same functions on tensors. Loops over lines of groups took two to
eight times as long, most of it for loads, stores and loop ends. N and M are the lengths of the
tuples ``kept`` and ``positions``, so each pattern has its own compiled kernel. Every lane does the
same operations in the same order.

A polynomial is a dict from degree to vector; a coefficient that is not in it is 0. Arrays are fp32
lines along groups, (M, G) or (G,), padded to whole vectors; an intrinsic works on the groups from
``g`` on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
Vector = Any  # an LLVM value
Polynomial = dict[int, Vector]


class Block:
    """Emits the instructions of one call, whose arguments begin with ``kept`` and ``positions`` and
    end with ``g``.
    """

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        self.context, self.builder, self.signature, self.arguments = (
            context,
            builder,
            signature,
            arguments,
        )
        self.n, self.m = signature.args[0].count, signature.args[1].count
        self.size = min(self.n, self.m - self.n)
        self.type = ir.VectorType(ir.FloatType(), LANES)

    def number(self, value: float) -> Vector:
        """A constant in every lane."""
        return ir.Constant(self.type, [value] * LANES)

    def lines(self, argument: int) -> list[Vector]:
        """The lines of an (M, G) array."""
        return [self.builder.load(self._address(argument, row), align=4) for row in range(self.m)]

    def store(self, value: Vector, argument: int, row: int | None = None) -> None:
        """Write a line of an (M, G) array, or a (G,) array."""
        self.builder.store(value, self._address(argument, row), align=4)

    def _address(self, argument: int, row: int | None) -> Vector:
        array = self.context.make_array(self.signature.args[argument])(
            self.context, self.builder, self.arguments[argument]
        )
        strides = cgutils.unpack_tuple(self.builder, array.strides)
        offset = self.builder.mul(self.arguments[-1], strides[-1])
        if row is not None:
            offset = self.builder.add(offset, self.builder.mul(strides[0], strides[0].type(row)))
        return cgutils.pointer_add(
            self.builder, array.data, offset, return_type=self.type.as_pointer()
        )

    def fma(self, a: Vector, b: Vector, to: Vector) -> Vector:
        """a * b + to with one rounding."""
        kind = ir.FunctionType(self.type, [self.type] * 3)
        fused = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.fma.v{LANES}f32")
        return self.builder.call(fused, [a, b, to])

    def add_product(self, a: Vector, b: Vector, to: Vector | None) -> Vector:
        """a * b + to."""
        return self.builder.fmul(a, b) if to is None else self.fma(a, b, to)

    def choose(self, relation: str, a: Vector, b: Vector, yes: Vector, no: Vector) -> Vector:
        """``yes`` where ``a relation b``, else ``no`` (also where one is NaN)."""
        return self.builder.select(self.builder.fcmp_ordered(relation, a, b), yes, no)

    def middle(self, x: list[Vector]) -> tuple[Vector, Vector]:
        """The N-th and the next largest of x."""
        falling = list(x)
        for a, b in _comparisons(self.n, self.m):
            high, low = falling[a], falling[b]
            falling[a], falling[b] = (
                self.choose(">", high, low, high, low),
                self.choose(">", high, low, low, high),
            )
        return falling[self.n - 1], falling[self.n]

    def not_finite(self, x: list[Vector]) -> Vector:
        """0, or NaN where an x is not finite."""
        total = self.number(0)
        for one in x:
            total = self.builder.fadd(total, self.builder.fsub(one, one))
        return total

    def factors(self, x: list[Vector]) -> tuple[list[Vector], list[Vector]]:
        """(u, v) from e^-|l - t| with the sign of l - t, for the sets of K."""
        bits, one, u, v = ir.VectorType(ir.IntType(32), LANES), self.number(1), [], []
        for signed in x:
            is_below = self.builder.icmp_signed(
                "<", self.builder.bitcast(signed, bits), bits(None)
            )  # -0.0 too
            u.append(self.builder.select(is_below, one, signed))
            v.append(self.builder.select(is_below, self.builder.fneg(signed), one))
        return (u, v) if 2 * self.n <= self.m else (v, u)

    def times(self, poly: Polynomial, u: Vector, v: Vector) -> Polynomial:
        """``poly`` times u + v z, without what exceeds K."""
        product = {c: self.builder.fmul(u, term) for c, term in poly.items()}
        for c, term in poly.items():
            if c < self.size:
                product[c + 1] = self.add_product(v, term, product.get(c + 1))
        return product

    def times_both(
        self, poly: Polynomial, sums: Polynomial, u: Vector, v: Vector, d: Vector
    ) -> tuple[Polynomial, Polynomial]:
        """``poly`` (sums of w(S)) and ``sums`` (of w(S) d(S)) with one more position."""
        product = {c: self.builder.fmul(u, term) for c, term in sums.items()}
        for c, term in poly.items():
            if c < self.size:
                product[c + 1] = self.add_product(
                    v, self.add_product(d, term, sums.get(c)), product.get(c + 1)
                )
        return self.times(poly, u, v), product

    def coefficient(
        self, a: Polynomial, b: Polynomial, degree: int, to: Vector | None = None
    ) -> Vector | None:
        """That of z^degree in a b, added to ``to``."""
        for c, term in a.items():
            if degree - c in b:
                to = self.add_product(term, b[degree - c], to)
        return to

    def inverse(self, u: Vector, v: Vector, others: Polynomial) -> Vector:
        """1 / (v A + u B) of a position. Every position has the same sum, that over all sets, so
        one division serves all; it takes as long as 16 products.
        """
        whole = self.fma(v, others[self.size - 1], self.builder.fmul(u, others[self.size]))
        return self.builder.fdiv(self.number(1), whole)

    def others(self, prefix: Polynomial, suffix: Polynomial) -> tuple[Vector, Vector]:
        """A and B of the position between."""
        return self.coefficient(prefix, suffix, self.size - 1), self.coefficient(
            prefix, suffix, self.size
        )


def _comparisons(n: int, m: int) -> list[tuple[int, int]]:
    """Comparisons (larger first) that bring the N-th and the next largest of M in place: of a
    sorting network, those that they need.
    """
    needed, kept = {n - 1, n}, []
    for pair in reversed(sorting_network(m)):
        if not needed.isdisjoint(pair):
            needed.update(pair)
            kept.append(pair)
    return kept[::-1]


def sorting_network(count: int) -> list[tuple[int, int]]:
    """Batcher's odd-even merge sort as comparisons (a, b), a < b."""
    pairs, merged = [], 1
    while merged < count:
        step = merged
        while step:
            for start in range(step % merged, count - step, 2 * step):
                for a in range(start, min(start + step, count - step)):
                    if a // (2 * merged) == (a + step) // (2 * merged):
                        pairs.append((a, a + step))
            step //= 2
        merged *= 2
    return pairs


def emit(write: Callable[[Any], None], kind: type[Block] = Block) -> Callable[..., Any]:
    """The code generator of an intrinsic that returns nothing; ``write`` gets a ``kind``."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        write(kind(context, builder, signature, arguments))
        return context.get_dummy_value()

    return build


@intrinsic
def threshold(typing_context: Any, kept: Any, positions: Any, middle: Any, x: Any, g: Any) -> Any:
    """middle (G,) = midway between the N-th and the next largest of x (M, G), or NaN where an x is
    not finite.
    """

    def write(block: Block) -> None:
        x, half = block.lines(3), block.number(0.5)
        above, below = block.middle(x)
        block.store(block.fma(half, above, block.fma(half, below, block.not_finite(x))), 2)

    return types.void(kept, positions, middle, x, g), emit(write)


@intrinsic
def keep_largest(typing_context: Any, kept: Any, positions: Any, mask: Any, x: Any, g: Any) -> Any:
    """mask (M, G) = 1 for the N largest x (M, G), the earlier of equals first, else 0; NaN where an
    x is not finite.
    """

    def write(block: Block) -> None:
        x, one, zero, bad = (
            block.lines(3),
            block.number(1),
            block.number(0),
            block.not_finite(block.lines(3)),
        )
        least, _ = block.middle(x)
        above = [block.choose(">", position, least, one, zero) for position in x]
        left = block.number(block.n)  # how many that equal the N-th are kept
        for position in above:
            left = block.builder.fsub(left, position)
        for j, position in enumerate(x):
            equal = block.choose(
                "==", position, least, block.choose(">", left, zero, one, zero), zero
            )
            left = block.builder.fsub(left, equal)
            block.store(block.builder.fadd(block.builder.fadd(above[j], equal), bad), 2, j)

    return types.void(kept, positions, mask, x, g), emit(write)


@intrinsic
def marginals(typing_context: Any, kept: Any, positions: Any, mask: Any, x: Any, g: Any) -> Any:
    """mask (M, G) = the probability that each position is kept; x (M, G) = e^-|l - t| with the sign
    of l - t.
    """

    def write(block: Block) -> None:
        u, v = block.factors(block.lines(3))
        suffixes = [{0: block.number(1)}]
        for j in reversed(range(1, block.m)):
            suffixes.append(block.times(suffixes[-1], u[j], v[j]))
        prefix, part = suffixes[0], block.inverse(u[0], v[0], suffixes[-1])
        own, degree = (v, block.size - 1) if 2 * block.n <= block.m else (u, block.size)
        for j, suffix in enumerate(reversed(suffixes)):
            share = block.builder.fmul(own[j], block.coefficient(prefix, suffix, degree))
            block.store(block.builder.fmul(share, part), 2, j)
            prefix = block.times(prefix, u[j], v[j])

    return types.void(kept, positions, mask, x, g), emit(write)


@intrinsic
def covariances(typing_context: Any, kept: Any, positions: Any, slope: Any, x: Any, g: Any) -> Any:
    """slope (M, G) becomes the covariance of each position's presence with the sum of slope over
    the set; x as for ``marginals``.
    """

    def write(block: Block) -> None:
        (u, v), d, builder = block.factors(block.lines(3)), block.lines(2), block.builder
        tails: list[tuple[Polynomial, Polynomial]] = [({0: block.number(1)}, {})]
        for j in reversed(range(1, block.m)):
            tails.append(block.times_both(*tails[-1], u[j], v[j], d[j]))
        (prefix, sums), part = tails[0], block.inverse(u[0], v[0], tails[-1][0])
        for j, (suffix, suffix_sums) in enumerate(reversed(tails)):
            a, b = block.others(prefix, suffix)
            qa, qb = (
                block.coefficient(sums, suffix, k, block.coefficient(prefix, suffix_sums, k))
                or block.number(0)
                for k in (block.size - 1, block.size)
            )
            both = builder.fmul(builder.fmul(v[j], part), builder.fmul(u[j], part))
            spread = block.fma(
                builder.fmul(d[j], a), b, builder.fsub(builder.fmul(qa, b), builder.fmul(qb, a))
            )
            block.store(builder.fmul(both, spread), 2, j)
            prefix, sums = block.times_both(prefix, sums, u[j], v[j], d[j])

    return types.void(kept, positions, slope, x, g), emit(write)


@intrinsic
def largest_probability(
    typing_context: Any, kept: Any, positions: Any, largest: Any, x: Any, g: Any
) -> Any:
    """largest (G,) = the probability of the best set; x as for ``marginals``."""

    def write(block: Block) -> None:
        product: Polynomial = {0: block.number(1)}
        for u, v in zip(*block.factors(block.lines(3)), strict=True):
            product = block.times(product, u, v)
        block.store(block.builder.fdiv(block.number(1), product[block.size]), 2)

    return types.void(kept, positions, largest, x, g), emit(write)
