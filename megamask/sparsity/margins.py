"""Margins: how far each weight of a group is from changing sides.

A criterion keeps the N largest scores of a group. The middle between the last of these and the next
score divides the group, and the margin of a weight is the distance of its score from the middle, on
the side that the mask chose; where a polish went against the scores, the margin is the least.
Scores of different linears have different units, so a margin is told in medians of its linear.
Learning starts each weight at its margin (``graded``): a near-tie of the criterion flips after few
steps, a clear choice only on strong evidence.

A margin is kept as a level, a number of 4 bits on a scale of logarithms, made in two steps. A rank
writes down the logarithm of its margins (``to_codes``), which needs no other rank. Where the whole
linear is at hand, the median is taken off (``to_levels``), in integers, so the layout does not
show.

Shapes: O out_features, I in_features, M group size.
"""

from __future__ import annotations

import torch

from megamask.sparsity.pattern import Pattern

LEVELS = 16  # 4 bits a weight
PER_OCTAVE = 2  # levels, and codes, to a factor of two
CODES = 256  # margins from 2^-64 to 2^64
ONE = 128  # the code of margin 1
TOP = 4  # the highest level lies so many above the median: four medians


def to_codes(score_OI: torch.Tensor, mask_OI: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The margin of every weight on a scale of logarithms, (O, I) uint8.

    Args:
        score_OI: the criterion's scores, finite, of any float dtype and unit.
        mask_OI: bool, N of every group: the N largest scores but for the exchanges of a polish. A
            weight on the other side than its score gets the lowest code, for no evidence.
        pattern: N:M. The margin of a unit is that of the sum of its scores, for all its weights.
    """
    units = pattern.units
    score = pattern.sum_of_units(score_OI.float()).unflatten(-1, (-1, units.m))
    kept = pattern.of_units(mask_OI).unflatten(-1, (-1, units.m))
    last, following = score.topk(units.n + 1, dim=-1).values[..., -2:].split(1, dim=-1)
    middle = last / 2 + following / 2
    margin = torch.where(kept, score - middle, middle - score).clamp_min(0)
    octaves = margin.log2()  # -inf at a tie and against the score
    codes = (octaves * PER_OCTAVE).round().add(ONE).clamp(0, CODES - 1)
    return pattern.expand(codes.flatten(-2)).to(torch.uint8)


def to_levels(codes_OI: torch.Tensor) -> torch.Tensor:
    """The levels, (O, I) uint8, of the codes of a whole linear: ``LEVELS`` - 1 stands for four
    medians and more, and each level below for a factor of the root of two.
    """
    counts = torch.bincount(codes_OI.flatten().int(), minlength=CODES)
    middle = (codes_OI.numel() + 1) // 2
    median = int(torch.searchsorted(counts.cumsum(0), torch.tensor(middle)))
    levels = codes_OI.to(torch.int16) + (LEVELS - 1 - TOP - median)
    return levels.clamp(0, LEVELS - 1).byte()


def margins_of(levels_OI: torch.Tensor) -> torch.Tensor:
    """The margins of levels, (O, I) fp32, in medians of the linear."""
    octaves = (torch.arange(LEVELS, device=levels_OI.device) + (TOP + 1 - LEVELS)) / PER_OCTAVE
    table = octaves.exp2()
    return table[levels_OI.int()]


def graded(mask_OI: torch.Tensor, margins_OI: torch.Tensor, cap: float) -> torch.Tensor:
    """A prior with degrees, (O, I) fp32: 1/2 plus half the margin for a kept weight, less half the
    margin for a removed weight. At the median of margins the prior is the mask itself, 1 and 0.

    Args:
        mask_OI: bool.
        margins_OI: above 0, in medians.
        cap: margins count up to here.
    """
    half = margins_OI.clamp(max=cap) / 2
    return 0.5 + torch.where(mask_OI, half, -half)
