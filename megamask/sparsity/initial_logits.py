"""Noise of the initial mask logits.

Shapes: O out_features, G groups per row, L mask logits a group.
"""

from __future__ import annotations

import math

import torch

from megamask.sparsity.draw import Site
from megamask.sparsity.noise import INITIAL_STEP, NoiseKey, uniform, words


def initial_noise(site: Site, groups: int, std: float, seed: int, parameter: int) -> torch.Tensor:
    """N(0, (std * noise_unit)^2) logits, (O, L, G) fp32 (Box-Muller).

    The noise is keyed by the global number of each group, so it is the same at any tensor-parallel
    size.

    Args:
        site: pattern, distribution and place of the shard.
        groups: G of the shard.
        std: ``learn.sampling.logit_std``.
        seed: of the run.
        parameter: id of the layer.
    """
    count = site.logits_per_group
    scale = std * site.distribution.noise_unit(site.pattern)
    key = NoiseKey(seed, INITIAL_STEP, 0, parameter)
    word = words(key, site.placement.group_ids(groups), 2 * count)
    radius = torch.sqrt(-2 * torch.log(uniform(word[:count]).double()))
    angle = 2 * math.pi * uniform(word[count:]).double()
    return (scale * radius * torch.cos(angle)).float().transpose(0, 1).contiguous()
