"""CPU kernels of ``ranked``: contexts of groups, adaptive frequencies, and rANS with four states.

A kernel runs on one thread, without the GIL, and computes with integers alone, so that every
machine reads what another wrote.
"""

from __future__ import annotations

import numpy as np
from numba import njit

I64, U16, U32, U64 = np.int64, np.uint16, np.uint32, np.uint64
PROBABILITY_BITS = 14  # frequencies of a context sum to 2 ** 14
LOWEST = 1 << 16  # a state is in [2 ** 16, 2 ** 32)
STATES = 4  # group g belongs to state g % 4, so that four divisions or look-ups run side by side
FIRST = 128  # groups before the first new frequencies, and at least between two
LARGEST = 1 << 16  # groups at most between two new frequencies
PARENT = 24  # groups that the frequencies of all neighbours of a context count for


@njit(nogil=True, cache=True, error_model="numpy")
def contexts(keys, n, m, classes, context, order):
    """Sort every group, and tell its context from gaps between magnitudes.

    Args:
        keys: (groups * m,) uint16, magnitudes as integers that are nearly logarithmic.
        n, m: of the pattern.
        classes: (4, 1024) uint16, four parts of the number of a context, to be added: of the gap
            between the n-th and the next magnitude, of the gaps before and after, each 255 at most,
            and of the n-th magnitude less the mean and plus 512.
        context: (groups,) uint16, filled.
        order: (groups, m) uint8, filled with positions, the largest magnitude first; equal
            magnitudes in the order of their positions.
    """
    mean = _mean(keys)
    row = np.empty(m + 2, np.int64)  # the largest and the smallest key stand twice
    for group in range(len(context)):
        _sort(keys, group * m, m, row, order, group)
        row[0], row[m + 1] = row[1], row[m]
        context[group] = _context(row[n - 1], row[n], row[n + 1], row[n + 2], classes, mean)


@njit(nogil=True, cache=True, error_model="numpy")
def contexts_of_four(keys, n, classes, context, order):
    """``contexts`` for m = 4, sorted without a branch. ``order`` is (groups,) uint32, a byte for
    each position, the first in the lowest.
    """
    mean = _mean(keys)
    for group in range(len(context)):
        at = U64(group) * U64(4)
        a, b = _two((I64(keys[at]) << 2) | 3, (I64(keys[at + U64(1)]) << 2) | 2)
        c, d = _two((I64(keys[at + U64(2)]) << 2) | 1, I64(keys[at + U64(3)]) << 2)
        a, c = _two(a, c)
        b, d = _two(b, d)
        b, c = _two(b, c)
        places = (a & 3) | (b & 3) << 8 | (c & 3) << 16 | (d & 3) << 24
        order[group] = U32(0x03030303 - places)
        a, b, c, d = a >> 2, b >> 2, c >> 2, d >> 2
        if n == 2:
            context[group] = _context(a, b, c, d, classes, mean)
        elif n == 1:
            context[group] = _context(a, a, b, c, classes, mean)
        else:
            context[group] = _context(b, c, d, d, classes, mean)


@njit(inline="always")
def _mean(keys):
    """The mean of all keys, rounded down."""
    total = U64(0)
    for at in range(len(keys)):
        total += U64(keys[at])
    return I64(total // U64(len(keys)))


@njit(inline="always")
def _context(before, nth, following, after, classes, mean):
    """Number of the classes of three gaps and a level."""
    found = classes[0, U64(min(nth - following, 255))]
    found += classes[1, U64(min(before - nth, 255))]
    found += classes[2, U64(min(following - after, 255))]
    return U16(found + classes[3, U64(min(max(nth - mean + 512, 0), 1023))])


@njit(inline="always")
def _two(one, other):
    """The larger of two numbers first, without a branch."""
    return max(one, other), min(one, other)


@njit(inline="always")
def _sort(keys, first, m, row, order, group):
    """Fill ``row[1 : m + 1]`` with the keys of a group, the largest first, and ``order``."""
    for place in range(m):
        key = I64(keys[first + place])
        at = place
        while at > 0 and row[at] < key:
            row[at + 1] = row[at]
            order[group, at] = order[group, at - 1]
            at -= 1
        row[at + 1] = key
        order[group, at] = place


@njit(inline="always")
def _next_block(done, groups):
    """End of the block that begins at ``done``."""
    return min(done + min(max(done // 2, FIRST), LARGEST), groups)


@njit(inline="always")
def _refresh(counts, parents, starts, children):
    """New frequencies from the counts of all groups before. ``starts`` is (contexts, C + 1)."""
    symbols = counts.shape[1]
    free = (1 << PROBABILITY_BITS) - symbols
    parents[:] = 1
    parents[:, 0] = symbols  # the n largest are the most frequent, whatever comes
    for context in range(len(counts)):
        for symbol in range(symbols):
            parents[context // children, symbol] += counts[context, symbol]
    share = np.empty(symbols, np.int64)
    for context in range(len(counts)):
        parent = parents[context // children]
        of_parent = parent.sum()
        whole = 0
        for symbol in range(symbols):
            share[symbol] = I64(counts[context, symbol]) * 256
            share[symbol] += parent[symbol] * (PARENT * 256) // of_parent + 1
            whole += share[symbol]
        start = 0
        for symbol in range(symbols):
            starts[context, symbol] = start
            start += 1 + share[symbol] * free // whole
        # Whatever rounding left over goes to the last symbol, whose end is fixed.
        starts[context, symbols] = 1 << PROBABILITY_BITS


@njit(nogil=True, cache=True, error_model="numpy")
def encode(symbols, context, counts, parents, starts, children, first, size, out):
    """The words of symbols, from the end of ``out``.

    Args:
        symbols: (groups,) uint8.
        context: (groups,) uint16, each a row of ``counts``.
        counts: (contexts, C) int32, zeros.
        parents: (contexts / children, C) int64.
        starts: (contexts, C + 1) uint16.
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
    """The inverse of ``encode``; ``symbols`` (groups,) uint8 is filled. ``words`` is uint16.

    Returns:
        Number of words that were read, or -1 where the words are none of ``encode``.
    """
    groups, length = len(symbols), len(words)
    if length < 2 * STATES:
        return -1
    s0, s1, s2, s3 = _word(words, 0), _word(words, 2), _word(words, 4), _word(words, 6)
    at, done = 2 * STATES, 0
    while done < groups:
        _refresh(counts, parents, starts, children)
        end = _next_block(done, groups)
        for group in range(done, end):
            row = U64(context[group])
            slot = s0 & U32((1 << PROBABILITY_BITS) - 1)
            symbol, start, stop = U64(0), U32(0), U32(starts[row, U64(1)])
            while slot >= stop:
                symbol += U64(1)
                start, stop = stop, U32(starts[row, symbol + U64(1)])
            state = (stop - start) * (s0 >> U32(PROBABILITY_BITS)) + (slot - start)
            if state < U32(LOWEST):
                if at == length:
                    return -1
                state = (state << U32(16)) | U32(words[U64(at)])
                at += 1
            s0, s1, s2, s3 = s1, s2, s3, state
            symbols[group] = symbol
            counts[row, symbol] += 1
        done = end
    if s0 != U32(LOWEST) or s1 != U32(LOWEST) or s2 != U32(LOWEST) or s3 != U32(LOWEST):
        return -1
    return at


@njit(inline="always")
def _word(words, at):
    return U32(words[at]) | (U32(words[at + 1]) << U32(16))


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
