"""The model of the settings is the model that a run was converted from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamask.errors import ArtifactError
from megamask.model.checkpoint import read_note
from megamask.safe_checkpoint import NOTE
from megamask.weights.base_model import BaseModel
from megamask.weights.fingerprint import fingerprints_of
from megamask.weights.model_identity import (
    FILES,
    FINGERPRINT,
    difference,
    identity_note,
    model_facts_of,
)
from megamask.weights.source import WeightSource

FIX = "Bring back the model as it was, or run the verb convert again to take it as it is."


def check_converted(base: BaseModel, weights: Path, note: Mapping[str, Any] | None = None) -> None:
    """Check that a model is the one that Megatron weights were made of. A model that is no longer
    there is not compared, nor are weights without a note, such as those of Megatron-LM.

    Args:
        base: the model.
        weights: what a verb made of it.
        note: the note beside the weights, where it was read already.

    Raises:
        ArtifactError: a linear, another tensor or config.json differs.
    """
    if not base.place.exists() or not (weights / NOTE).exists():
        return
    if problem := difference(read_note(weights) if note is None else note, base):
        raise ArtifactError(base.place, f"{problem} than when {weights} was made of it", FIX)


def check_given_weights(weights: Path, own: WeightSource, base: BaseModel) -> None:
    """Check that weights which the user names hold the numbers of the model itself, so that a mask
    of the model may stand on them.

    Args:
        weights: the folder. Weights that ``convert`` wrote have a note of their other tensors, and
            their linears are compared; of others every tensor is.
        own: the weights, opened.
        base: the model.

    Raises:
        ArtifactError: the numbers are others.
    """
    if (weights / NOTE).exists():
        linears = fingerprints_of(own, base.architecture()).exact
        problem = difference({FINGERPRINT: linears}, base)
    else:
        note = identity_note(base, own)
        problem = difference({key: note[key] for key in note if key != FILES}, base)
    if problem:
        fix = "Leave export.weights null, or write them without the mask: export.mask=dense."
        raise ArtifactError(
            weights, f"is not the base model of the mask: {base.place} {problem}", fix
        )


def digest_of_model(base: BaseModel, weights: Path) -> dict[str, str]:
    """The digest of a model, under its key: from the note beside the weights that were made of it
    (see ``check_converted``), or from the model itself where the run has none.
    """
    if (weights / NOTE).exists():
        return model_facts_of(read_note(weights))
    with base.open() as source:
        return model_facts_of(identity_note(base, source))
