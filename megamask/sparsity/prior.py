"""Initial mask logits: keyed normal noise plus the pull of a prior mask (MaskLLM, Eq. 9-10)."""

from __future__ import annotations

import math

import torch

from megamask.sparsity.draw import Site
from megamask.sparsity.philox import INITIAL_STEP, NoiseKey, uniform, words


def initial_noise(site: Site, groups: int, std: float, seed: int, parameter: int) -> torch.Tensor:
    """N(0, std) logits, (O, C, G) fp32, keyed by the global group, so the same at any tensor-parallel size (Box-Muller)."""
    candidates = site.pattern.num_candidates
    key = NoiseKey(seed, INITIAL_STEP, 0, parameter)
    word = words(key, site.placement.group_ids(groups), 2 * candidates)
    radius = torch.sqrt(-2 * torch.log(uniform(word[:candidates]).double()))
    angle = 2 * math.pi * uniform(word[candidates:]).double()
    return (std * radius * torch.cos(angle)).float().transpose(0, 1).contiguous()


def similarity(prior_mask_OI: torch.Tensor, site: Site) -> torch.Tensor:
    """sim(M_0, M_c) = M_0 . M_c minus its mean over candidates, (O, C, G) (Eq. 9; the mean is n^2 / m)."""
    pattern = site.pattern
    groups = prior_mask_OI.float().unflatten(1, (-1, pattern.m))
    overlap = torch.einsum("ogm,cm->ocg", groups, pattern.candidates(device=prior_mask_OI.device))
    return overlap - pattern.n * pattern.n / pattern.m


def prior_bonus(prior_mask_OI: torch.Tensor, site: Site, strength: float, std: float) -> torch.Tensor:
    """std * sim * alpha, added to the initial logits, (O, C, G) (Eq. 10). ``std`` is that of the whole layer's logits."""
    return similarity(prior_mask_OI, site) * (std * strength)
