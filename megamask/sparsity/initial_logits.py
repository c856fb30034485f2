"""Noise of the initial mask logits.

Shapes: O out_features, G groups per row, L mask logits a group.
"""

from __future__ import annotations

import math

import torch

from megamask.sparsity.draw import Site
from megamask.sparsity.noise import INITIAL_STEP, NoiseKey, uniform, words

# Groups whose noise is made at a time: on a CPU their words stay in the cache, and a GPU gets work
# for all of its cores with some 100 MB of memory.
TILES = {"cpu": 1 << 15, "cuda": 1 << 18}


def initial_noise(
    site: Site,
    groups: int,
    std: float,
    seed: int,
    parameter: int,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """N(0, (std * noise_unit)^2) logits, (O, L, G) fp32 (Box-Muller).

    The noise is keyed by the global number of each group, so it is the same at any tensor-parallel
    size. It is made where the layer is, in fp64. The logarithm and the cosine of a GPU may differ
    from those of a CPU in the last bit of fp64, and so, seldom, in the last bit after rounding.

    Args:
        site: pattern, distribution and place of the shard.
        groups: G of the shard.
        std: ``learn.sampling.logit_std``.
        seed: of the run.
        parameter: id of the layer.
        device: of the logits.
    """
    count = site.logits_per_group
    scale = std * site.distribution.noise_unit(site.pattern)
    key = NoiseKey(seed, INITIAL_STEP, 0, parameter)
    ids_OG = site.placement.group_ids(groups, device)
    noise_OLG = torch.empty(len(ids_OG), count, groups, device=device)
    rows = max(1, TILES.get(torch.device(device).type, TILES["cpu"]) // max(1, groups))
    for part_OLG, part_OG in zip(noise_OLG.split(rows), ids_OG.split(rows), strict=True):
        word = words(key, part_OG, 2 * count)
        radius = torch.sqrt(-2 * torch.log(uniform(word[:count]).double()))
        angle = 2 * math.pi * uniform(word[count:]).double()
        part_OLG.copy_((scale * radius * torch.cos(angle)).float().transpose(0, 1))
    return noise_OLG
