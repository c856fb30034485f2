"""The sampler of a backend, whatever the distribution of the site."""

from __future__ import annotations

import torch

from megamask.sparsity.draw import RETURNED, GradientSink, Sample, Sampled, Site
from megamask.sparsity.operator import sampler_for


class AnyDistribution:
    """``draw.Sampler`` by one backend."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def forward(
        self,
        mask_logits: torch.Tensor,
        weight: torch.Tensor,
        site: Site,
        sample: Sample,
        statistics: bool = False,
    ) -> Sampled:
        """As ``Sampler.forward``."""
        sampler = sampler_for(self.backend, site.distribution)
        return sampler.forward(mask_logits, weight, site, sample, statistics)

    def backward(
        self,
        grad: torch.Tensor,
        mask_logits: torch.Tensor,
        weight: torch.Tensor,
        site: Site,
        sample: Sample,
        sink: GradientSink = RETURNED,
    ) -> torch.Tensor:
        """As ``Sampler.backward``."""
        sampler = sampler_for(self.backend, site.distribution)
        return sampler.backward(grad, mask_logits, weight, site, sample, sink)

    def mask_statistics(
        self, mask_logits: torch.Tensor, site: Site, kappa: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``Sampler.mask_statistics``."""
        return sampler_for(self.backend, site.distribution).mask_statistics(
            mask_logits, site, kappa
        )


PLAIN, FUSED, TRITON = map(AnyDistribution, ("torch", "numba", "triton"))
