"""Masks drawn without replacement, and the scores of their probabilities: the maths of MaskPro in
plain PyTorch.

A group has one logit l_i per member and p = softmax(l). N members are drawn one after the other,
each with probability ~ exp(l_i) among those left. The N largest of l + g, with a standard Gumbel g
per member, are such a draw, in falling order (Gumbel-top-N trick; Kool, van Hoof, Welling, 2019),
so the hard draw of k_subset.py at kappa = tau = 1 is the one wanted here, and keyed noise brings it
back
when its score is needed: no mask is stored.

Score = gradient of the log-probability at the logits. With R the members left before a draw and
q_R(i) = exp(l_i) / sum over R:

    ordered  log P(i_1 .. i_N) = sum_k log q_{R_k}(i_k),  score_j = sum_k (1[j = i_k] - q_{R_k}(j)
    1[j in R_k])
    set      P(S) = sum over the orders of S,             score_j = E(ordered score | S)

The second has the smaller variance for the same mask (Rao-Blackwell): the order tells nothing about
the loss, and where p is nearly 1 for the kept members, the ordered score of an unchanged group is
noise of size 1, that of the set almost 0. It takes 2^N sums.

Nothing is computed as 1 - sum of drawn p. What is left is summed over members that are left, in
units of the largest of them, and a drawn member's 1 - q is the others' share. For the set, with C
the drawn members still left, in any order, and U the sum over the others:

    W_C = U + sum_{i in C} w_i,   fail_C = (U + sum_{i in C} w_i fail_{C-i}) / W_C,   done_C =
    sum_{i in C} w_i done_{C-i} / W_C
    visit_S = 1,  visit_{C-i} gets visit_C w_i done_{C-i} / (W_C done_C)
    score_j = w_j sum_{C with j} visit_C (fail_C - fail_{C-j}) / (W_C done_C)   for a drawn j,
    -w_j sum_C visit_C / W_C   for another

done_C = 1 - fail_C is the chance that the draws from C on stay within C, visit_C the chance that C
was left at some time, given S. The difference in the score is taken between whichever of fail and
done is small.

Shapes: O out_features, I in_features, G groups per row, M group size. mask_logits are (O, M, G).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from typing import TypeAlias, cast

import torch

from megamask.errors import ConfigError
from megamask.sparsity.draw import Sample, Site, scores
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.pattern import Pattern

AddScores: TypeAlias = Callable[[torch.Tensor, Site, NoiseKey, Sequence[float], str], None]

MAX_SET = 4  # N up to which the probability of a set is summed over its orders
# A drawn logit's distance, in nats, from the largest of the others, held in the range where fp32
# sums neither overflow nor vanish. Above it 1 - p is below 1e-13; below it nothing is drawn,
# because noise of 23 bits differs by 19.5 at most.
LEAST, MOST = -20.0, 30.0


def sample_of(key: NoiseKey) -> Sample:
    """The sample that ``key`` names: N positions without replacement, p = softmax of the logits as
    they are.
    """
    return Sample(key, kappa=1.0, tau=1.0, hard=True)


def choose_score(kind: str, pattern: Pattern) -> str:
    """``ordered`` or ``set``; ``auto`` takes the set while it has few orders.

    Raises:
        ConfigError: a set with too many orders.
    """
    drawn = pattern.units.n
    if kind == "auto":
        return "set" if drawn <= MAX_SET else "ordered"
    if kind == "set" and drawn > MAX_SET:
        raise ConfigError(
            "learn.maskpro.score",
            kind,
            f"ordered for N > {MAX_SET}, here {pattern}",
            "Use ordered, or auto.",
        )
    return kind


def ordered_score(logits_OMG: torch.Tensor, rank_OMG: torch.Tensor, n: int) -> torch.Tensor:
    """Score of the draws made, (O, M, G); ``rank`` 0 .. N - 1 are the drawn members in their order,
    N and more the others.
    """
    score = torch.zeros_like(logits_OMG)
    for k in range(n):
        left = rank_OMG >= k
        top = logits_OMG.where(left, -torch.inf).amax(1, keepdim=True)
        share = (logits_OMG - top).exp().where(left, 0)
        drawn = rank_OMG == k
        others = share.where(~drawn, 0).sum(1, keepdim=True)
        score += torch.where(drawn, others, -share) / share.sum(1, keepdim=True)
    return score


def set_score(logits_OMG: torch.Tensor, mask_OMG: torch.Tensor, n: int) -> torch.Tensor:
    """Score of the set of drawn members, (O, M, G), whatever their order; ``mask`` is True for the
    N drawn.
    """
    position = mask_OMG.to(torch.int64).argsort(dim=1, descending=True, stable=True)[
        :, :n
    ]  # of the drawn
    top = logits_OMG.where(~mask_OMG, -torch.inf).amax(1, keepdim=True)
    weight = (logits_OMG - top).clamp(max=MOST).exp()
    rest = weight.where(~mask_OMG, 0).sum(1)
    drawn = weight.gather(1, position).clamp(min=math.exp(LEAST)).unbind(1)
    whole, done, fail, visit = _walk(rest, drawn)
    inverse = sum((visit[c] / whole[c] for c in range(1, 1 << n)), torch.zeros_like(rest))
    parts = []
    for b, w in enumerate(drawn):
        part = torch.zeros_like(w)
        for c in (c for c in range(1 << n) if c >> b & 1):
            gain = torch.where(
                fail[c] < 0.5, fail[c] - fail[c ^ 1 << b], done[c ^ 1 << b] - done[c]
            )
            part += visit[c] * gain / (whole[c] * done[c])
        parts.append(w * part)
    return (-weight * inverse.unsqueeze(1)).scatter(1, position, torch.stack(parts, 1))


def _walk(rest: torch.Tensor, drawn: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], ...]:
    """(whole, done, fail, visit) of every set C of drawn members, each (O, G); bit b of C's number
    stands for drawn[b].
    """
    subsets = range(1, 1 << len(drawn))
    whole, done, fail = [rest], [torch.ones_like(rest)], [torch.zeros_like(rest)]
    for c in subsets:
        bits = [b for b in range(len(drawn)) if c >> b & 1]
        whole.append(whole[c & (c - 1)] + drawn[bits[0]])
        done.append(
            sum((drawn[b] * done[c ^ 1 << b] for b in bits), torch.zeros_like(rest)) / whole[c]
        )
        fail.append(sum((drawn[b] * fail[c ^ 1 << b] for b in bits), rest) / whole[c])
    visit = [torch.zeros_like(rest) for _ in whole]
    visit[-1] += 1
    for c in reversed(subsets):
        for b in range(len(drawn)):
            if c >> b & 1:
                visit[c ^ 1 << b] += visit[c] * drawn[b] * done[c ^ 1 << b] / (whole[c] * done[c])
    return whole, done, fail, visit


def score_of(
    logits_OMG: torch.Tensor, perturbed_OMG: torch.Tensor, n: int, kind: str
) -> torch.Tensor:
    """Score, ordered or set, of the draw that keeps the N largest of ``perturbed``; of equals the
    earlier is drawn first.
    """
    rank = perturbed_OMG.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (
        ordered_score(logits_OMG, rank, n)
        if kind == "ordered"
        else set_score(logits_OMG, rank < n, n)
    )


def add_scores_of(backend: str) -> AddScores:
    """The ``add_scores`` whose draws are those of a forward pass with this backend."""
    name = {"numba": "score_numba", "triton": "score_triton"}.get(backend, "score")
    module = import_module(f"{__package__}.{name}")
    return cast(AddScores, module.add_scores)


@torch.no_grad()
def add_scores(
    mask_logits: torch.Tensor, site: Site, key: NoiseKey, coefficients: Sequence[float], kind: str
) -> None:
    """mask_logits += sum_k coefficients[k] * score of mask k, in place, every score taken before
    anything is added.

    Args:
        mask_logits: (O, M, G) fp32.
        site: pattern of single units and place of the shard (``Site.of_units``).
        key: the step's and the parameter's; mask k has ``micro_batch`` k.
        coefficients: one a mask.
        kind: ``ordered`` or ``set``.
    """
    change = torch.zeros_like(mask_logits)
    for number, coefficient in enumerate(coefficients):
        perturbed = scores(mask_logits, site, sample_of(replace(key, micro_batch=number)))
        change += coefficient * score_of(mask_logits, perturbed, site.pattern.n, kind)
    mask_logits += change
