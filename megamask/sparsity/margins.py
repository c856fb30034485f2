"""Margins: how far each weight of a group is from changing sides.

A criterion keeps the N largest scores of a group. The middle between the last of these and the next
score divides the group, and the margin of a weight is the distance of its score from the middle, on
the side that the mask chose; where the mask of a polish goes against a score, the margin is the
least.
Scores of different linears have different units, so a margin is told in medians of its linear.
Learning starts each weight at its margin (``graded``): a near-tie of the criterion flips after few
steps, a clear choice only on strong evidence.

A margin is kept as a level, a number of 4 bits on a scale of logarithms, made in two steps. A rank
writes down the logarithm of its margins (``to_codes``), which needs no other rank. Where the whole
linear is at hand, the median is taken off (``to_levels``), in integers, so the layout does not
show.

Shapes: O out_features, I in_features, U units of a row, G groups per row, M units of a group.
"""

from __future__ import annotations

import torch

from megamask.sparsity.by_position import border, columns, pieces
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
        mask_OI: bool, N of every group: the N largest scores, but for a polish, whose exchanges
            hang on two weights. A weight on the other side than its score gets the lowest code, for
            no evidence.
        pattern: N:M. The margin of a unit is that of the sum of its scores, for all its weights.
    """
    units = pattern.units
    rows, width = score_OI.shape
    codes_OU = score_OI.new_empty(rows, width // pattern.unit, dtype=torch.uint8)
    for some in pieces(codes_OU):
        score_MOG = columns(pattern.sum_of_units(score_OI[some].float()), units.m)
        kept_MOG = columns(pattern.of_units(mask_OI[some]), units.m)
        last_OG, following_OG = border(score_MOG, units.n)
        side_MOG = kept_MOG.to(score_MOG).mul_(2).sub_(1)  # 1 for a kept weight, -1 for a removed
        # A new tensor: ``columns`` may be a view of the scores.
        margin_MOG = (score_MOG - (last_OG / 2 + following_OG / 2)).mul_(side_MOG).clamp_min_(0)
        octaves_MOG = margin_MOG.log2_()  # -inf at a tie and against the score
        codes_MOG = octaves_MOG.mul_(PER_OCTAVE).round_().add_(ONE).clamp_(0, CODES - 1)
        codes_OU[some].unflatten(-1, (-1, units.m)).copy_(codes_MOG.movedim(0, -1))
    return pattern.expand(codes_OU)


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
