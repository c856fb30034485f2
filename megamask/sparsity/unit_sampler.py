"""The sampling of masks whose units are several adjacent weights, by the sampler of single weights.

A sampler sees one weight a unit: the norm of the unit's weights. With m the mask of a unit and w_i
its weights, the gradient at m of the loss and of the weight-norm term is

    dm = sum_i dW_i w_i - 2 norm_coef m sum_i w_i^2 = dV v - 2 norm_coef m v^2

for v = |w| and dV = (sum_i dW_i w_i) / v, which is the rule of a single weight v. So every sampler,
fused or not, serves units.

Shapes: O out_features, I in_features, G groups per row, L logits a group, U units of a row.
"""

from __future__ import annotations

import torch

from megamask.sparsity.backends import sampler_for
from megamask.sparsity.draw import RETURNED, GradientSink, Sample, Sampled, Sampler, Site


def sampler_at(site: Site, backend: str) -> Sampler:
    """The sampler of a site's distribution on a backend (of ``choose_backend``), which serves the
    units of the site's pattern.
    """
    sampler = sampler_for(backend, site.distribution)
    return sampler if site.pattern.unit == 1 else UnitSampler(sampler)


class UnitSampler:
    """A sampler of units.

    Args:
        single: the sampler of single weights.
    """

    def __init__(self, single: Sampler) -> None:
        self.single = single

    def forward(
        self,
        mask_logits: torch.Tensor,
        weight: torch.Tensor,
        site: Site,
        sample: Sample,
        statistics: bool = False,
    ) -> Sampled:
        """Sample a mask of units and apply it to their weights; as ``Sampler.forward``."""
        units = weight.shape[1] // site.pattern.unit
        ones = torch.ones(weight.shape[0], units, dtype=torch.float32, device=weight.device)
        drawn = self.single.forward(mask_logits, ones, site.of_units, sample, statistics)
        masked = site.pattern.expand(drawn.masked).mul_(weight)
        norm = masked.square().sum(dtype=torch.float64).to(drawn.sums)
        return Sampled(
            masked.to(weight.dtype), torch.stack([norm, drawn.sums[1]]), drawn.hard_codes
        )

    def backward(
        self,
        grad: torch.Tensor,
        mask_logits: torch.Tensor,
        weight: torch.Tensor,
        site: Site,
        sample: Sample,
        sink: GradientSink = RETURNED,
    ) -> torch.Tensor:
        """Gradient at the mask logits; as ``Sampler.backward``."""
        wide, pattern = weight.float(), site.pattern
        norm_OU = pattern.sum_of_units(wide.square()).sqrt_()
        slope_OU = pattern.sum_of_units(grad.float() * wide)
        slope_OU = torch.where(norm_OU > 0, slope_OU / norm_OU, 0)
        return self.single.backward(slope_OU, mask_logits, norm_OU, site.of_units, sample, sink)

    def mask_statistics(
        self, mask_logits: torch.Tensor, site: Site, kappa: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hard codes and largest probabilities of units; as ``Sampler.mask_statistics``."""
        return self.single.mask_statistics(mask_logits, site.of_units, kappa)
