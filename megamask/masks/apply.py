"""Masks on a transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from megamask.errors import ArtifactError
from megamask.masks.file import MaskSet, load_masks
from megamask.weights.fingerprint import fingerprint_model, model_linears

Model = TypeVar("Model", bound=nn.Module)


def apply_masks(
    hf_model: Model, masks: MaskSet | Path | str, check_fingerprint: bool = True
) -> Model:
    """Set the pruned weights of a transformers model to +0.0, in place.

    All checks come before the first change of a weight.

    Args:
        hf_model: the model that the masks were made for.
        masks: the path of a mask file, or the result of ``load_masks``.
        check_fingerprint: False also accepts changed weights (fine-tuned, updated by SparseGPT) of
            the same shapes.

    Returns:
        ``hf_model``.

    Raises:
        ArtifactError: the masks belong to updated weights or to another base model, the file is
            corrupt, or the model has no linear of a mask's name and shape.
    """
    mask_set = masks if isinstance(masks, MaskSet) else load_masks(masks)
    if mask_set.has_own_weights and check_fingerprint:
        raise ArtifactError(
            mask_set.path,
            f"belongs to weights that {mask_set.method} updated, not to those of this model",
            f"Run megamask export export.mask={mask_set.method} and load the folder that it "
            "writes, or use a mask of the frozen weights.",
        )
    linears = model_linears(hf_model)
    mask_set.check(shapes={name: tuple(linear.weight.shape) for name, linear in linears.items()})
    if check_fingerprint:
        mask_set.check(fingerprint=fingerprint_model(hf_model))
    mask_set.verify()
    with torch.no_grad():
        for name, mask_OI in mask_set.items():
            weight_OI = linears[name].weight
            weight_OI.copy_(masked(weight_OI, mask_OI))
    return hf_model


def masked(weight_OI: Tensor, mask_OI: Tensor) -> Tensor:
    """The weight with +0.0 in pruned places.

    A product with the mask would leave -0.0, and some sparse kernels keep such a value.
    """
    return weight_OI.masked_fill(~mask_OI.to(weight_OI.device), 0.0)
