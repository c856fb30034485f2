"""Initial mask logits: keyed normal noise plus the pull of a prior mask (MaskLLM, Eq. 9-10).

Shapes: O out_features, I in_features, G groups per row, L logits a group: C candidates
(categorical) or M members (linear).
"""

from __future__ import annotations

import math

import torch

from megamask.sparsity.draw import Site
from megamask.sparsity.noise import INITIAL_STEP, NoiseKey, uniform, words
from megamask.sparsity.subset.match_entropy import noise_scale, position_bonus


def initial_noise(site: Site, groups: int, std: float, seed: int, parameter: int) -> torch.Tensor:
    """N(0, std) logits, (O, L, G) fp32, keyed by the global group, so the same at any
    tensor-parallel size (Box-Muller).

    ``std`` is that of candidates; members get the part of it that ``calibration.noise_scale`` says.
    """
    count, scale = site.logits_per_group, std * unit(site)
    key = NoiseKey(seed, INITIAL_STEP, 0, parameter)
    word = words(key, site.placement.group_ids(groups), 2 * count)
    radius = torch.sqrt(-2 * torch.log(uniform(word[:count]).double()))
    angle = 2 * math.pi * uniform(word[count:]).double()
    return (scale * radius * torch.cos(angle)).float().transpose(0, 1).contiguous()


def unit(site: Site) -> float:
    """Standard deviation of initial logits in units of ``learn.sampling.logit_std``."""
    return noise_scale(site.pattern) if site.distribution == "linear" else 1.0


def similarity(prior_mask_OI: torch.Tensor, site: Site) -> torch.Tensor:
    """sim(M_0, M_c) = M_0 . M_c minus its mean over candidates, (O, C, G) (Eq. 9; the mean is n^2 /
    m).
    """
    pattern = site.pattern
    groups = prior_mask_OI.float().unflatten(1, (-1, pattern.m))
    overlap = torch.einsum("ogm,cm->ocg", groups, pattern.candidates(device=prior_mask_OI.device))
    return overlap - pattern.n * pattern.n / pattern.m


def prior_bonus(
    prior_mask_OI: torch.Tensor, site: Site, strength: float, std: float, spread: float = 0.0
) -> torch.Tensor:
    """What a prior mask adds to the initial logits, (O, L, G): std * sim * alpha (Eq. 10), or its
    counterpart for members.

    Args:
        prior_mask_OI: the prior.
        site: pattern and distribution.
        strength: alpha.
        std: of the whole layer's candidate logits.
        spread: first kappa times the std of the noise, 0 without noise; decides the members' bonus
            (``calibration``).
    """
    if site.distribution == "categorical":
        return similarity(prior_mask_OI, site) * (std * strength)
    kept = prior_mask_OI.float().unflatten(1, (-1, site.pattern.m)).transpose(1, 2)
    return (kept - site.pattern.density) * (std * position_bonus(site.pattern, strength, spread))
