"""The order of the scores within groups, found on whole columns of positions at a time.

A sort along an axis of four numbers spends most of its time between the groups. On a CPU a few
comparisons of columns, each the scores of one position of every group, take a fifth of the time and
give the same bits.

Shapes: O rows, I in_features, G groups per row (I / m), M group size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

PIECE = 1 << 18  # weights that a thread works on at a time, so that they stay in its cache
LARGEST_GROUP = 16  # comparisons grow with the square of M
MANY = 512  # times M * M: weights from which on the comparisons are worth their calls


def columns(of_weights: torch.Tensor, m: int) -> torch.Tensor:
    """(..., I) as contiguous (M, ..., G)."""
    return of_weights.unflatten(-1, (-1, m)).movedim(-1, 0).contiguous()


def pieces(of_weights: torch.Tensor) -> Iterator[slice]:
    """Slices that cover the rows of (O, I), of a size that suits the cache; all rows at once on
    another device than the CPU.
    """
    rows, width = of_weights.shape
    step = rows
    if of_weights.device.type == "cpu":
        step = PIECE * torch.get_num_threads() // max(width, 1)
    step = max(step, 1)
    yield from (slice(first, first + step) for first in range(0, rows, step))


def best_of_groups(score: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Bool mask (..., I) of the n largest of every m; ties go to the earlier position, and NaN is
    larger than any number.
    """
    many = score.numel() >= MANY * m * m and m <= LARGEST_GROUP
    if not many or score.device.type != "cpu":
        return _by_sorting(score, n, m)
    score_OI = score.reshape(-1, score.shape[-1])
    mask_OI = torch.empty(score_OI.shape, dtype=torch.bool)
    for rows in pieces(score_OI):
        score_MOG = columns(score_OI[rows], m)
        if score_MOG.sum().isnan():
            mask_OI[rows] = _by_sorting(score_OI[rows], n, m)
            continue
        kept_MOG = _ranks(score_MOG).lt_(n).view(torch.bool)
        mask_OI[rows].unflatten(-1, (-1, m)).copy_(kept_MOG.movedim(0, -1))
    return mask_OI.view(score.shape)


def _by_sorting(score: torch.Tensor, n: int, m: int) -> torch.Tensor:
    groups = score.unflatten(-1, (-1, m))
    kept = groups.argsort(dim=-1, descending=True, stable=True)[..., :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, kept, True).flatten(-2)


def _ranks(score_MOG: torch.Tensor) -> torch.Tensor:
    """How many scores of its group go before each score, (M, O, G) uint8."""
    ranks_MOG = torch.zeros_like(score_MOG, dtype=torch.uint8)
    for later in range(1, len(score_MOG)):
        for earlier in range(later):
            goes_before = score_MOG[earlier] >= score_MOG[later]
            ranks_MOG[later] += goes_before
            ranks_MOG[earlier] += goes_before.logical_not_()
    return ranks_MOG


def border(score_MOG: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The n-th largest score of every group and the next, (O, G) each, of scores without NaN."""
    if len(score_MOG) > LARGEST_GROUP:
        largest = score_MOG.topk(n + 1, dim=0).values
        return largest[-2], largest[-1]
    # The largest score rises to the front, then the largest of the others, up to number n + 1.
    order = list(score_MOG)
    for front in range(n + 1):
        for place in range(len(order) - 1, front, -1):
            one, other = order[place - 1], order[place]
            order[place - 1], order[place] = torch.maximum(one, other), torch.minimum(one, other)
    return order[n - 1], order[n]
