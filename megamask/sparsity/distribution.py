"""What the code outside a distribution's own folder knows of a distribution of masks.

A distribution has a folder with its object, its plain PyTorch reference and, optionally, its fused
kernels, and one line in ``distributions.py``.

Shapes: O out_features, I in_features, G groups per row, L mask logits a group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from megamask.sparsity.pattern import Pattern


class Distribution(ABC):
    """A distribution of N:M masks with L logits a group.

    Attributes:
        name: in settings and messages.
        reference: dotted path of the module with the plain PyTorch sampler (``draw.Sampler``).
        numba: of the module with fused CPU kernels (``kernels/numba_host.py`` says what it
            exports); None: there are none.
        triton: of the module with fused CUDA kernels (``kernels/triton_host.py``); None: there are
            none.
    """

    name: str
    reference: str
    numba: str | None = None
    triton: str | None = None

    def __repr__(self) -> str:
        return self.name

    @abstractmethod
    def logits_per_group(self, pattern: Pattern) -> int:
        """L.

        Raises:
            ConfigError: the pattern is too large for the distribution.
        """

    @abstractmethod
    def code_dtype(self, pattern: Pattern) -> torch.dtype:
        """The smallest integer that holds the hard code of a group."""

    @abstractmethod
    def mask_of(self, hard_codes_OG: torch.Tensor, pattern: Pattern) -> torch.Tensor:
        """The mask, (O, I) bool, of the hard codes that samplers return."""

    def index_of(self, hard_codes: torch.Tensor, pattern: Pattern) -> Any:
        """Candidate index of every hard code, an array or tensor of integers of the same shape.

        Args:
            hard_codes: of any shape, on the CPU.
            pattern: N:M.

        Raises:
            ValueError: a code is none of this pattern.
        """
        return pattern.index_of(self.mask_of(hard_codes, pattern))

    @abstractmethod
    def hard_mask(self, logits_OLG: torch.Tensor, pattern: Pattern) -> torch.Tensor:
        """The most probable mask, (O, I) bool. Draws no noise."""

    @abstractmethod
    def scores(self, logits_OLG: torch.Tensor, pattern: Pattern) -> torch.Tensor:
        """A score of every weight, (O, I) fp32: the hard mask keeps the N largest of a group, and
        the distances between scores are distances between logits.
        """

    @abstractmethod
    def prior_bonus(
        self,
        prior_OI: torch.Tensor,
        pattern: Pattern,
        strength: float,
        std: float,
        spread: float = 0.0,
    ) -> torch.Tensor:
        """What a prior mask adds to the initial logits, (O, L, G) (MaskLLM, arXiv 2409.17481,
        Eq. 9-10).

        Args:
            prior_OI: the prior: a mask, or fp32 degrees around 1/2 (``margins.graded``).
            pattern: N:M.
            strength: alpha.
            std: standard deviation of the initial logits of the whole layer, in units of
                ``noise_unit``.
            spread: the first kappa times ``learn.sampling.logit_std``; 0 without initial noise.
        """

    @abstractmethod
    def noise_unit(self, pattern: Pattern) -> float:
        """Standard deviation of initial logits in units of ``learn.sampling.logit_std``."""

    def fold_bytes(self, pattern: Pattern) -> float:
        """Working memory of ``mask_of`` in bytes per weight, the mask itself left out."""
        return float(self.code_dtype(pattern).itemsize)

    @abstractmethod
    def reference_bytes(self, pattern: Pattern) -> float:
        """Working memory of the plain PyTorch sampler in bytes per logit of a layer."""
