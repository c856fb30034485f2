"""What the sampling of one layer works on besides its mask logits and its weight.

Shapes: O out_features, I in_features, G groups per row, L mask logits a group (C candidates or M
positions).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import torch

from megamask.sparsity.distribution import Distribution
from megamask.sparsity.noise import NoiseKey, uniform, words
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement


@dataclass(frozen=True)
class Sample:
    """What is drawn: one mask of one layer, named by its noise.

    Attributes:
        key: names the noise.
        kappa: scale of the mask logits.
        tau: temperature.
        hard: the mask is exactly N of M, with the gradient of the soft mask (straight-through).
        noise: factor on the Gumbel noise of every logit. 0 draws nothing: the soft mask is that of
            the logits alone, and the key does not matter.
    """

    key: NoiseKey
    kappa: float
    tau: float
    hard: bool = False
    noise: float = 1.0

    def of(self, parameter_id: int) -> Sample:
        """The same sample for the layer with this parameter id."""
        return replace(self, key=replace(self.key, parameter=parameter_id))


@dataclass(frozen=True)
class GradientSink:
    """What the backward pass does with the gradient at the mask logits.

    Attributes:
        norm_coef: the gradient of ``- norm_coef * sum |W * M|^2`` is added. The coefficient is
            already divided by the number of micro-batches, as the LM loss is.
        buffer: (O, L, G) fp32 or bf16, where the gradient is added; None returns the gradient.
        replace: the gradient replaces the content of the buffer instead. The first micro-batch of a
            step does so, which spares clearing the buffer.
    """

    norm_coef: float = 0.0
    buffer: torch.Tensor | None = None
    replace: bool = False

    def put(self, gradient: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Store an fp32 or wider gradient: the buffer, or without one the gradient in ``dtype``."""
        if self.buffer is None:
            return gradient.to(dtype)
        whole = gradient if self.replace else self.buffer.to(gradient.dtype) + gradient
        return self.buffer.copy_(whole)


RETURNED = GradientSink()  # the gradient of the loss alone, returned


class Sampled(NamedTuple):
    """What the sampling of one layer gives.

    Attributes:
        masked: W * M, (O, I) in the weight's dtype.
        sums: (2,) fp64: sum |W * M|^2, and the sum over groups of the largest probability of a
            candidate, exp(kappa * its logit) over the sum of all (0 without statistics).
        hard_codes: the hard mask of every group, (O, G), in the code of ``Site.mask_of``; (0,)
            without statistics.
    """

    masked: torch.Tensor
    sums: torch.Tensor
    hard_codes: torch.Tensor

    @classmethod
    def of(
        cls,
        mask: torch.Tensor,
        weight: torch.Tensor,
        site: Site,
        statistics: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> Sampled:
        """Of a sampled mask (O, I), in the dtype of the mask, and of what ``mask_statistics``
        returns, where it was asked for.
        """
        masked = weight.to(mask.dtype) * mask
        norm = masked.square().sum(dtype=torch.float64)
        nothing = norm.new_empty(0, dtype=site.code_dtype), torch.zeros_like(norm)
        codes, largest = nothing if statistics is None else statistics
        return cls(masked.to(weight.dtype), torch.stack([norm, largest]), codes)


@dataclass(frozen=True)
class Site:
    """A masked weight: its pattern, its place in the whole layer, and the distribution of its
    masks.

    Attributes:
        pattern: N:M.
        placement: where the local shard lies in the whole layer.
        distribution: of the masks; decides how many logits a group has and what they mean.

        logits_per_group: L, the middle axis of mask logits (O, L, G).
        code_dtype: the integer dtype of hard codes.

    Raises:
        ConfigError: the pattern is too large for the distribution.
    """

    pattern: Pattern
    placement: Placement
    distribution: Distribution
    logits_per_group: int = field(init=False, repr=False, compare=False)
    code_dtype: torch.dtype = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # computed once: every step reads them
        for name in ("logits_per_group", "code_dtype"):
            object.__setattr__(self, name, getattr(self.distribution, name)(self.pattern))

    @cached_property
    def of_units(self) -> Site:
        """The same place with the pattern of the units, as if each unit were one weight."""
        return self if self.pattern.unit == 1 else replace(self, pattern=self.pattern.units)

    def mask_of(self, hard_codes_OG: torch.Tensor) -> torch.Tensor:
        """The mask, (O, I) bool, of hard codes."""
        return self.distribution.mask_of(hard_codes_OG, self.pattern)


class Sampler(Protocol):
    """The sampling of one distribution by one backend; ``unit_sampler.sampler_at`` finds it."""

    def forward(
        self,
        mask_logits: torch.Tensor,
        weight: torch.Tensor,
        site: Site,
        sample: Sample,
        statistics: bool = False,
    ) -> Sampled:
        """Sample a mask and apply it to the weight.

        Args:
            mask_logits: (O, L, G) fp32 or bf16.
            weight: (O, I) fp32 or bf16.
            site: pattern, distribution and place of the shard.
            sample: what is drawn.
            statistics: also take ``mask_statistics`` in the same pass over the logits.
        """
        ...

    def backward(
        self,
        grad: torch.Tensor,
        mask_logits: torch.Tensor,
        weight: torch.Tensor,
        site: Site,
        sample: Sample,
        sink: GradientSink = RETURNED,
    ) -> torch.Tensor:
        """Gradient at the mask logits, (O, L, G), of ``grad``, the gradient at W * M. The noise is
        drawn again from its key.

        Returns the sink's buffer, or without one a new tensor in the dtype of the logits.
        """
        ...

    def mask_statistics(
        self, mask_logits: torch.Tensor, site: Site, kappa: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(hard codes (O, G), sum over groups of the largest probability of a candidate, 0-d).

        Draws no noise: both describe the logits themselves.
        """
        ...


def scores(mask_logits: torch.Tensor, site: Site, sample: Sample) -> torch.Tensor:
    """l = (kappa pi + noise g) / tau, (O, L, G), with a Gumbel g for every logit; at ``noise`` 0
    nothing is drawn.
    """
    score = mask_logits * sample.kappa
    if sample.noise:
        g = gumbel_noise(site, sample, mask_logits.shape[-1], mask_logits.device, mask_logits.dtype)
        score = score + sample.noise * g
    return score / sample.tau


def gumbel_noise(
    site: Site, sample: Sample, groups: int, device: torch.device | str, dtype: torch.dtype
) -> torch.Tensor:
    """Gumbel noise g = -log(-log u), (O, L, G) (MaskLLM, arXiv 2409.17481, Eq. 5), one for every
    logit; ``scores`` scales it.
    """
    group_ids = site.placement.group_ids(groups, device)
    word = words(sample.key, group_ids, site.logits_per_group)  # (L, O, G)
    return -torch.log(-torch.log(uniform(word).to(dtype))).transpose(0, 1)


def computing_dtype(mask_logits: torch.Tensor) -> torch.dtype:
    """The dtype that the plain samplers compute in: fp32, or wider if the logits are."""
    return torch.promote_types(mask_logits.dtype, torch.float32)
