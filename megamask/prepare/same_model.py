"""The model of the settings is the model that a run was converted from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamask.errors import ArtifactError
from megamask.model.checkpoint import read_note
from megamask.safe_checkpoint import NOTE
from megamask.weights.base_model import BaseModel
from megamask.weights.model_identity import difference, identity_note, model_facts_of

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


def digest_of_model(base: BaseModel, weights: Path) -> dict[str, str]:
    """The digest of a model, under its key: from the note beside the weights that were made of it
    (see ``check_converted``), or from the model itself where the run has none.
    """
    if (weights / NOTE).exists():
        return model_facts_of(read_note(weights))
    with base.open() as source:
        return model_facts_of(identity_note(base, source))
