"""CPU kernels of ``ranked``: contexts of groups, adaptive frequencies, and rANS with four states.

A kernel runs on one thread, without the GIL, and its results are those of integers, so that every
machine reads what another wrote.
"""

from __future__ import annotations

import numpy as np
from numba import njit

I32, I64, U16, U64 = np.int32, np.int64, np.uint16, np.uint64
PROBABILITY_BITS = 14  # frequencies of a context sum to 2 ** 14
LOWEST = 1 << 16  # a state is in [2 ** 16, 2 ** 32)
STATES = 4  # group g belongs to state g % 4, so that four divisions or look-ups run side by side
FIRST = 128  # groups before the first new frequencies, and at least between two
LARGEST = 1 << 16  # groups at most between two new frequencies
LANES = 64  # groups that are sorted at once
PLACE_BITS = 4  # of a position in a group
FEW = 6  # candidates that are compared at once
SLOT = U64((1 << PROBABILITY_BITS) - 1)
PARENT = 24  # groups that the frequencies of all neighbours of a context count for


@njit(nogil=True, cache=True, error_model="numpy")
def contexts(keys, n, m, bounds, context, order):
    """Sort every group, and tell its context from gaps between magnitudes.

    Args:
        keys: (groups * m,) uint16 below 2 ** 15, magnitudes as integers that are nearly
            logarithmic.
        n, m: of the pattern.
        bounds: tuples of ascending integers, at which a new class begins: of the gap between the
            n-th and the next magnitude, of the gaps on either side of it, and of the n-th magnitude
            less the mean.
        context: (groups,) uint16, filled.
        order: (groups, m) uint8, filled with positions, the largest magnitude first; equal
            magnitudes in the order of their positions.
    """
    mean, groups = _mean(keys), len(context)
    rows = np.zeros((m + 2, LANES), np.int32)  # the largest and the smallest key stand twice
    for first in range(0, groups, LANES):
        lanes = min(LANES, groups - first)
        for place in range(m):
            # Below a key is a number that falls with the position, which decides between equals.
            for lane in range(lanes):
                key = I32(keys[(first + lane) * m + place])
                rows[place + 1, lane] = (key << PLACE_BITS) + (m - 1 - place)
        _sort(rows, m)
        for place in range(m):
            for lane in range(lanes):
                order[first + lane, place] = m - 1 - (rows[place + 1, lane] & (2**PLACE_BITS - 1))
        rows >>= PLACE_BITS
        rows[0], rows[m + 1] = rows[1], rows[m]
        for lane in range(lanes):
            a, b, c, d = rows[n - 1, lane], rows[n, lane], rows[n + 1, lane], rows[n + 2, lane]
            context[first + lane] = _context(a, b, c, d, bounds, mean)


@njit(nogil=True, cache=True, error_model="numpy")
def contexts_of_four(keys, n, bounds, context, order):
    """``contexts`` for m = 4, without a branch and in 32 bits, so that several groups are sorted at
    once. ``order`` is (groups,) uint8, two bits for each position, the first in the lowest.
    """
    mean = _mean(keys)
    groups = keys.view(np.uint64)
    for group in range(len(context)):
        # Below a key are two bits that fall with its position.
        a, b = _two(_key(groups[group], 0) | I32(3), _key(groups[group], 16) | I32(2))
        c, d = _two(_key(groups[group], 32) | I32(1), _key(groups[group], 48))
        a, c = _two(a, c)
        b, d = _two(b, d)
        b, c = _two(b, c)
        order[group] = ~((a & 3) | (b & 3) << 2 | (c & 3) << 4 | (d & 3) << 6)
        a, b, c, d = I32(a >> 2), I32(b >> 2), I32(c >> 2), I32(d >> 2)
        if n == 1:
            a, b, c, d = a, a, b, c
        elif n == 3:
            a, b, c, d = b, c, d, d
        context[group] = _context(a, b, c, d, bounds, mean)


@njit(inline="always")
def _key(group, shift):
    """One of the four keys of a number, times four."""
    return I32(((group >> U64(shift)) & U64(0x7FFF)) << U64(2))


@njit(inline="always")
def _mean(keys):
    """The mean of all keys, rounded down."""
    total = U64(0)
    for at in range(len(keys)):
        total += U64(keys[at])
    return I32(total // U64(len(keys)))


@njit(inline="always")
def _context(before, nth, following, after, bounds, mean):
    """Number of the classes of three gaps and a level."""
    middles, sides, levels = bounds
    found = _class(I32(nth - following), middles)
    found = I32(found * (len(sides) + 1)) + _class(I32(before - nth), sides)
    found = I32(found * (len(sides) + 1)) + _class(I32(following - after), sides)
    return U16(I32(found * (len(levels) + 1)) + _class(I32(nth - mean), levels))


@njit(inline="always")
def _class(value, bounds):
    """How many bounds a value has reached."""
    found = I32(0)
    for bound in bounds:
        found = I32(found + I32(value >= I32(bound)))
    return found


@njit(inline="always")
def _two(one, other):
    """The larger of two numbers first, without a branch."""
    return max(one, other), min(one, other)


@njit(inline="always")
def _sort(rows, m):
    """Sort rows 1 to m of every column, the largest first, by swaps of neighbours without a
    branch.
    """
    for end in range(m, 1, -1):
        for at in range(1, end):
            for lane in range(LANES):
                larger, smaller = _two(rows[at, lane], rows[at + 1, lane])
                rows[at, lane], rows[at + 1, lane] = larger, smaller


@njit(inline="always")
def _next_block(done, groups):
    """End of the block that begins at ``done``."""
    return min(done + min(max(done // 2, FIRST), LARGEST), groups)


@njit(inline="always")
def _refresh(counts, parents, starts, children):
    """New frequencies from the counts of all groups before. ``starts`` is (contexts, C + 1), or
    wider with the end of the last symbol again.
    """
    symbols = counts.shape[1]
    free = (1 << PROBABILITY_BITS) - symbols
    parents[:] = 1
    parents[:, 0] = symbols  # the n largest are the most frequent, whatever comes
    for context in range(len(counts)):
        for symbol in range(symbols):
            parents[context // children, symbol] += counts[context, symbol]
    share, of_parent = np.empty(symbols, np.int64), np.empty(symbols, np.int64)
    for context in range(len(counts)):
        if context % children == 0:
            parent = parents[context // children]
            of_parent[:] = parent * (PARENT * 256) // parent.sum() + 1
        whole = 0
        for symbol in range(symbols):
            share[symbol] = I64(counts[context, symbol]) * 256 + of_parent[symbol]
            whole += share[symbol]
        inverse = 1 / whole
        for symbol in range(symbols):
            # share * free // whole: float64 misses it by one at most, which the rest tells.
            part = share[symbol] * free
            quotient = I64(part * inverse)
            rest = part - quotient * whole
            share[symbol] = quotient + I64(rest >= whole) - I64(rest < 0)
        start = 0
        for symbol in range(symbols):
            starts[context, symbol] = start
            start += 1 + share[symbol]
        # Whatever rounding left over goes to the last symbol, whose end is fixed.
        starts[context, symbols:] = 1 << PROBABILITY_BITS


@njit(nogil=True, cache=True, error_model="numpy")
def encode(symbols, context, counts, parents, starts, children, first, size, out):
    """The words of symbols, from the end of ``out``.

    Args:
        symbols: (groups,) uint8.
        context: (groups,) uint16, each a row of ``counts``.
        counts: (contexts, C) int32, zeros.
        parents: (contexts / children, C) int64.
        starts: (contexts, C + 1 or more) uint16.
        children: contexts with a parent in common.
        first, size: (groups,) uint16, of the interval of every symbol; filled.
        out: (groups + 2 * STATES,) uint16.

    Returns:
        Index of the first word in ``out``.
    """
    groups = len(symbols)
    done = 0
    while done < groups:
        _refresh(counts, parents, starts, children)
        end = _next_block(done, groups)
        for group in range(done, end):
            row, symbol = context[group], symbols[group]
            first[group] = starts[row, symbol]
            size[group] = starts[row, symbol + 1] - starts[row, symbol]
            counts[row, symbol] += 1
        done = end
    states = np.full(STATES, LOWEST, np.int64)
    at = len(out)
    for group in range(groups - 1, -1, -1):
        state, count = states[group % STATES], I64(size[group])
        if state >= count << (32 - PROBABILITY_BITS):
            at -= 1
            out[at] = state & 0xFFFF
            state >>= 16
        whole = state // count
        states[group % STATES] = (
            (whole << PROBABILITY_BITS) + (state - whole * count) + I64(first[group])
        )
    for number in range(STATES - 1, -1, -1):
        at -= 2
        out[at], out[at + 1] = states[number] & 0xFFFF, states[number] >> 16
    return at


@njit(nogil=True, cache=True, error_model="numpy")
def decode(words, context, counts, parents, starts, children, symbols):
    """The inverse of ``encode``; ``symbols`` (groups,) uint8 is filled. ``words`` is uint16. Where
    there are at most ``FEW`` candidates, ``starts`` is (contexts, FEW + 1).

    Returns:
        Number of words that were read, or -1 where the words are none of ``encode``.
    """
    groups, length = U64(len(symbols)), U64(len(words))
    if length < U64(2 * STATES):
        return -1
    s0, s1, s2, s3 = _word(words, 0), _word(words, 2), _word(words, 4), _word(words, 6)
    at, group, four = U64(2 * STATES), U64(0), U64(STATES)
    is_few = counts.shape[1] <= FEW
    while group < groups:
        _refresh(counts, parents, starts, children)
        end = U64(_next_block(I64(group), I64(groups)))
        while group < end:
            if is_few and group + four <= end and at + four <= length:
                s0, at = _few(s0, at, words, context, group, counts, starts, symbols)
                s1, at = _few(s1, at, words, context, group + U64(1), counts, starts, symbols)
                s2, at = _few(s2, at, words, context, group + U64(2), counts, starts, symbols)
                s3, at = _few(s3, at, words, context, group + U64(3), counts, starts, symbols)
                group += four
                continue
            row, slot = U64(context[group]), s0 & SLOT
            symbol, start, stop = U64(0), U64(0), U64(starts[row, U64(1)])
            while slot >= stop:
                symbol += U64(1)
                start, stop = stop, U64(starts[row, symbol + U64(1)])
            state = (stop - start) * (s0 >> U64(PROBABILITY_BITS)) + (slot - start)
            if state < U64(LOWEST):
                if at == length:
                    return -1
                state = (state << U64(16)) | U64(words[at])
                at += U64(1)
            s0, s1, s2, s3 = s1, s2, s3, state
            symbols[group] = symbol
            counts[row, symbol] += 1
            group += U64(1)
    low = U64(LOWEST)
    return I64(at) if s0 == low and s1 == low and s2 == low and s3 == low else -1


@njit(inline="always")
def _few(state, at, words, context, group, counts, starts, symbols):
    """Decode a group without a branch, so that the states of four groups are worked on at once.

    Returns:
        The next state of the same four, and the index of the next word. ``words[at]`` is read in
        any case.
    """
    row, slot = U64(context[group]), state & SLOT
    symbol = U64(0)
    for following in range(1, FEW):
        symbol += U64(slot >= U64(starts[row, U64(following)]))
    start, stop = U64(starts[row, symbol]), U64(starts[row, symbol + U64(1)])
    state = (stop - start) * (state >> U64(PROBABILITY_BITS)) + (slot - start)
    is_low, longer = state < U64(LOWEST), (state << U64(16)) | U64(words[at])
    symbols[group] = symbol
    counts[row, symbol] += 1
    return longer if is_low else state, at + U64(is_low)


@njit(inline="always")
def _word(words, at):
    return U64(words[at]) | (U64(words[at + 1]) << U64(16))


@njit(nogil=True, cache=True)
def to_positions(symbols, order, ranks, index_of_bits, index):
    """Candidates of positions, from candidates of ranks. ``ranks`` is (C, n) uint8."""
    for group in range(len(symbols)):
        bits = 0
        for kept in range(ranks.shape[1]):
            bits |= I64(1) << I64(order[group, ranks[symbols[group], kept]])
        index[group] = index_of_bits[bits]


@njit(nogil=True, cache=True)
def to_ranks(index, order, positions, index_of_bits, symbols):
    """The inverse of ``to_positions``. ``positions`` is (C, m) bool: whether a place is kept."""
    for group in range(len(index)):
        bits = 0
        for rank in range(order.shape[1]):
            bits |= I64(positions[index[group], order[group, rank]]) << rank
        symbols[group] = index_of_bits[bits]


@njit(nogil=True, cache=True)
def look_up(table, order, index, out):
    """``out[group] = table[order[group], index[group]]``, for ``order`` of ``contexts_of_four``."""
    for group in range(len(out)):
        out[group] = table[U64(order[group]), U64(index[group])]
