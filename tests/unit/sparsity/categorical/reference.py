"""The sampling written out a second time, slowly: Python integers for the noise, fp64 and autograd
for the rest.

Shapes: O out_features, I in_features, G groups per row, C candidates, M group size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from megamask.sparsity.noise import NoiseKey


def candidate_table(n: int, m: int) -> torch.Tensor:
    """(C, M) fp64: kept positions in lexicographic order, which is the 0/1 words in falling
    order.
    """
    words = (bits for bits in itertools.product((0, 1), repeat=m) if sum(bits) == n)
    return torch.tensor(sorted(words, reverse=True), dtype=torch.float64)


def philox4x32(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 as in Fig. 3 of Salmon et al., SC'11, on Python integers."""
    right_a, left_a, right_b, left_b = counter
    key_a, key_b = key
    for _ in range(10):
        high_a, low_a = divmod(right_a * 0xD2511F53, 1 << 32)
        high_b, low_b = divmod(right_b * 0xCD9E8D57, 1 << 32)
        right_a, left_a, right_b, left_b = (
            high_b ^ left_a ^ key_a,
            low_b,
            high_a ^ left_b ^ key_b,
            low_a,
        )
        key_a, key_b = (key_a + 0x9E3779B9) % (1 << 32), (key_b + 0xBB67AE85) % (1 << 32)
    return right_a, left_a, right_b, left_b


def group_words(key: NoiseKey, group: int, count: int) -> list[int]:
    """The first ``count`` words of a group."""
    blocks = range((count + 3) // 4)
    counters = [
        (group % (1 << 32), (group >> 32) * 256 + block, key.parameter, key.micro_batch)
        for block in blocks
    ]
    return [word for counter in counters for word in philox4x32(counter, (key.seed, key.step))][
        :count
    ]


def gumbel(key: NoiseKey, rows: int, candidates: int, groups: int) -> torch.Tensor:
    """Noise of a whole layer, (O, C, G) fp64."""
    words = [
        [group_words(key, o * groups + g, candidates) for g in range(groups)] for o in range(rows)
    ]
    u = (torch.tensor(words, dtype=torch.float64).div(512).floor() + 0.5) / 2**23
    return -(-u.log()).log().transpose(1, 2)


def mask(
    logits_OCG: torch.Tensor,
    noise_OCG: torch.Tensor,
    n: int,
    m: int,
    kappa: float,
    tau: float,
    hard: bool = False,
) -> torch.Tensor:
    """Sampled mask, (O, I) fp64, differentiable in the logits; ``hard`` is straight-through."""
    soft = torch.softmax((kappa * logits_OCG.double() + noise_OCG) / tau, dim=1)
    if hard:
        one_hot = torch.nn.functional.one_hot(soft.argmax(1), soft.shape[1]).transpose(1, 2)
        soft = one_hot + soft - soft.detach()
    table, (rows, _, groups) = candidate_table(n, m), soft.shape
    return (soft.transpose(1, 2).reshape(rows * groups, -1) @ table).reshape(rows, groups * m)
