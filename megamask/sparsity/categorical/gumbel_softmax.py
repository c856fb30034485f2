"""The relaxed categorical over candidates (MaskLLM, arXiv 2409.17481, Sec. 3.2) in plain PyTorch:
the readable reference of every backend.

Shapes: O out_features, I in_features, G groups per row, C candidates, M group size. mask_logits are
(O, C, G): the weight's leading axis first and groups last, so that they shard where the weight
shards and kernels read whole lines.
"""

from __future__ import annotations

from functools import reduce

import torch

from megamask.sparsity.draw import (
    RETURNED,
    GradientSink,
    Sample,
    Sampled,
    Site,
    computing_dtype,
    scores,
)


def soft_index(mask_logits: torch.Tensor, site: Site, sample: Sample) -> torch.Tensor:
    """y = softmax((kappa pi + noise g) / tau) over candidates, (O, C, G) (Eq. 6)."""
    score = scores(mask_logits, site, sample)
    y = (score - score.amax(1, keepdim=True)).exp()
    return y / _sum_over_candidates(y)


def _sum_over_candidates(terms_OCG: torch.Tensor) -> torch.Tensor:
    """Sum over axis 1, (O, 1, G), in candidate order. ``sum`` and ``softmax`` pick their order by
    shape: shards would differ in bits.
    """
    return reduce(torch.add, terms_OCG.unbind(1)).unsqueeze(1)


def mask_of_index(index_OCG: torch.Tensor, site: Site) -> torch.Tensor:
    """Weighted average of the candidates, (O, I) (Eq. 7)."""
    table_CM = site.pattern.candidates(index_OCG.dtype, index_OCG.device)
    return torch.einsum("ocg,cm->ogm", index_OCG, table_CM).flatten(1)


def sampled_mask(mask_logits: torch.Tensor, site: Site, sample: Sample) -> torch.Tensor:
    """The mask of one draw, (O, I): soft, or one-hot per group when ``sample.hard``."""
    y = soft_index(mask_logits, site, sample)
    return mask_of_index(_one_hot(y) if sample.hard else y, site)


def _one_hot(y_OCG: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(y_OCG).scatter_(1, y_OCG.argmax(1, keepdim=True), 1)


def forward(
    mask_logits: torch.Tensor,
    weight: torch.Tensor,
    site: Site,
    sample: Sample,
    statistics: bool = False,
) -> Sampled:
    """Sample a mask and apply it to the weight."""
    mask = sampled_mask(mask_logits.to(computing_dtype(mask_logits)), site, sample)
    about = mask_statistics(mask_logits, site, sample.kappa) if statistics else None
    return Sampled.of(mask, weight, site, about)


def backward(
    grad: torch.Tensor,
    mask_logits: torch.Tensor,
    weight: torch.Tensor,
    site: Site,
    sample: Sample,
    sink: GradientSink = RETURNED,
) -> torch.Tensor:
    """Gradient at the logits, (O, C, G), of ``grad``, the gradient at W * M; the noise is drawn
    again.

    With dW the gradient at W * M, y the soft index and S the candidate table:

        dM = dW * W - 2 norm_coef W^2 * M
        dy = dM S^T
        dpi = kappa / tau * y * (dy - sum_c y dy)
    """
    wide = computing_dtype(mask_logits)
    y = soft_index(mask_logits.to(wide), site, sample)
    mask = mask_of_index(_one_hot(y) if sample.hard else y, site)
    weight, grad = weight.to(wide), grad.to(wide)
    dmask = grad * weight - 2 * sink.norm_coef * weight.square() * mask
    table_CM = site.pattern.candidates(y.dtype, y.device)
    dy = torch.einsum("ogm,cm->ocg", dmask.unflatten(1, (-1, site.pattern.m)), table_CM)
    dlogits = sample.kappa / sample.tau * y * (dy - _sum_over_candidates(y * dy))
    return sink.put(dlogits, mask_logits.dtype)


def mask_statistics(
    mask_logits: torch.Tensor, site: Site, kappa: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(candidate index (O, G) uint8, sum over groups of the largest probability, 0-d). Draws no
    noise.
    """
    mask_logits = mask_logits.to(computing_dtype(mask_logits))
    top, hard_codes = mask_logits.max(dim=1)
    largest = 1 / ((mask_logits - top.unsqueeze(1)) * kappa).exp().sum(1)
    return hard_codes.to(site.code_dtype), largest.sum(dtype=torch.float64)
