"""The mask files of a learning run, and what they say about how they were learned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamask.config import Config
from megamask.data.blend import blend_weights
from megamask.errors import MegamaskError
from megamask.learn.masked_model import MaskedModel
from megamask.masks.file import load_masks, save_masks
from megamask.model.mask_shards import gather_masks
from megamask.parallel.mesh import Mesh


def save_learned_mask(
    path: Path,
    masked_model: MaskedModel,
    mesh: Mesh,
    data: Mapping[str, Any],
    evaluation: Mapping[str, Any],
) -> None:
    """Write the hard mask of the model. All ranks must call this; the main rank writes.

    Args:
        path: the mask file.
        masked_model: the model whose logits are read.
        mesh: process groups of this rank.
        data: what the mask was learned from.
        evaluation: how good it is.
    """
    local = {name: linear.hard_mask() for name, linear in masked_model.linears.items()}
    masks = gather_masks(local, masked_model.arch, mesh)
    if mesh.is_main:
        save_masks(
            path,
            masks,
            masked_model.pattern,
            fingerprint=masked_model.fingerprint,
            method="learned",
            data=dict(data),
            evaluation=dict(evaluation),
            float16_fingerprints=masked_model.float16_fingerprints,
        )
    mesh.barrier()


def learned_from(
    config: Config, steps: int, seconds: float, prior_method: str | None
) -> dict[str, Any]:
    """What the header of a mask file says about a run of ``steps`` steps."""
    return {
        "blend": blend_weights(config),
        "seq_length": config.data.seq_length,
        "tokens": steps * config.learn.global_batch * config.data.seq_length,
        "seconds": round(seconds, 1),
        "prior": prior_method,
        "method": config.learn.method,
    }


def step_of(path: Path) -> int | None:
    """The step of the evaluation in a mask file; None where there is no such file or evaluation."""
    try:
        evaluation = load_masks(path).meta.get("evaluation")
    except MegamaskError:
        return None
    step = evaluation.get("step") if isinstance(evaluation, dict) else None
    return step if isinstance(step, int) else None
