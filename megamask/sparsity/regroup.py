"""Which channels share a group: an order of channels in which an N:M mask loses less importance.

A mask keeps the n largest weights of every group, so a group of four important channels loses more
than two groups that share them. Channels are first dealt to the groups by their importance, as RIA
does (Zhang et al., ICLR 2024), and then swapped between groups while swaps lower the loss.

Shapes: R rows, C channels, M group size, G groups (C / M).
"""

from __future__ import annotations

import torch

from megamask.sparsity.pattern import Pattern

ROUNDS = 60  # at most
IDLE = 3  # times M rounds without a swap end a search
WORTH = 1e-6  # a swap gains at least this share of a group's loss; fp32 sums are good to about 1e-7
SEED = 0  # of the channel that a group gives away in a round


def lost(importance_RC: torch.Tensor, pattern: Pattern) -> float:
    """The importance that the best mask removes: in every group of a row the m - n smallest."""
    groups = importance_RC.unflatten(-1, (-1, pattern.m))
    smallest = groups.topk(pattern.m - pattern.n, dim=-1, largest=False).values
    return float(smallest.sum(dtype=torch.float64))


def dealt(importance_RC: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """An order, (C,) int64, in which the channels are dealt to the groups like cards, from the most
    important channel down: each group has one channel of every m-th part of the ranking.
    """
    ranked = importance_RC.sum(0).argsort(descending=True, stable=True)
    return ranked.view(pattern.m, -1).t().reshape(-1)


def regrouped(importance_RC: torch.Tensor, pattern: Pattern, rounds: int = ROUNDS) -> torch.Tensor:
    """An order of the channels, (C,) int64 on the CPU, in which a mask loses less importance.

    In a round every group gives away one channel, drawn anew. What a group loses with each of the
    channels in that place is a sum over rows of min(importance, threshold), where the threshold of
    a row is the (m - n)-th smallest of the channels that stay. So one matrix of L1 distances tells
    the exact gain of every swap, and disjoint swaps add up.

    Args:
        importance_RC: importance of every weight, at least 0, fp32.
        pattern: N:M; m divides C.
        rounds: number of rounds at most; 0 deals the channels and swaps none.

    Returns:
        the channel at each place. The order is never worse than the present one: where no better is
        found, it is 0, 1, 2, ... Channels of a group and groups are in ascending order, so that
        channels that may stay do.
    """
    channels = importance_RC.shape[1]
    groups, m = channels // pattern.m, pattern.m
    draws = torch.Generator().manual_seed(SEED)
    order_GM = dealt(importance_RC, pattern).view(groups, m)
    stay_G, idle = torch.arange(groups, device=order_GM.device), 0
    for _ in range(rounds):
        places = torch.rand(groups, m, generator=draws).argsort(1).to(order_GM.device)
        order_GM = order_GM.gather(1, places)
        partner_G = _swaps(_losses(importance_RC, order_GM, pattern))
        order_GM[:, 0] = order_GM[partner_G, 0]
        idle = idle + 1 if torch.equal(partner_G, stay_G) else 0
        if idle == IDLE * m:
            break
    order_GM = order_GM.sort(1).values
    order_C = order_GM[order_GM[:, 0].argsort()].reshape(-1)
    better = lost(importance_RC[:, order_C], pattern) < lost(importance_RC, pattern)
    return order_C.cpu() if better else torch.arange(channels)


def _losses(importance_RC: torch.Tensor, order_GM: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """What group g loses with the first channel of group c in the place of its own, (c, g), but
    for a part that does not depend on the channel.
    """
    groups_RGM = importance_RC[:, order_GM]
    given_GR = groups_RGM[:, :, 0].t().contiguous()
    # kthvalue would do, but has no deterministic form on CUDA
    stay_RGM = groups_RGM[:, :, 1:].topk(pattern.m - pattern.n, dim=-1, largest=False).values
    limit_GR = stay_RGM.amax(-1).t().contiguous()
    # min(a, b) = (a + b - |a - b|) / 2
    total = given_GR.sum(1)[:, None] + limit_GR.sum(1)
    return (total - torch.cdist(given_GR, limit_GR, p=1)) / 2


def _swaps(loss_CG: torch.Tensor) -> torch.Tensor:
    """The group whose channel each group takes, (G,) int64: itself, or the other of a pair whose
    swap gains most for both among the groups that have not swapped yet.
    """
    own_G = loss_CG.diagonal()
    gain_GG = own_G[:, None] + own_G - loss_CG - loss_CG.t()
    least = WORTH * own_G.abs().mean()
    index_G = torch.arange(len(own_G), device=own_G.device)
    partner_G = index_G.clone()
    while True:
        best_G, with_G = gain_GG.max(1)
        first = (with_G[with_G] == index_G) & (best_G > least) & (index_G < with_G)
        if not bool(first.any()):
            return partner_G
        one, other = index_G[first], with_G[first]
        partner_G[one], partner_G[other] = other, one
        swapped = torch.cat([one, other])
        gain_GG[swapped] = 0
        gain_GG[:, swapped] = 0
