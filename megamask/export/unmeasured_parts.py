"""The parts of a model that no text measures, such as an image tower: what is handed out has those
that lay beside the measured weights.
"""

from __future__ import annotations

from pathlib import Path

from megamask.errors import ArtifactError
from megamask.model.checkpoint import OTHER_TENSORS, read_note
from megamask.safe_checkpoint import NOTE
from megamask.weights.base_model import BaseModel


def check_other_tensors(base: BaseModel, weights: Path) -> None:
    """Check that the tensors beside the text part are those that the model had when it was
    converted.

    Args:
        base: the model.
        weights: what the verb convert made of it; where there is nothing, nothing is compared.

    Raises:
        ArtifactError: a tensor was changed, left out or added, or the weights are of a version
            that did not note these tensors.
    """
    if not (weights / NOTE).exists() or (found := base.other_tensors()) is None:
        return
    if read_note(weights).get(OTHER_TENSORS) != found:
        problem = "has other tensors beside its text part than when it was converted"
        fix = "Bring back the model as it was, or run the verb convert again to take it as it is."
        raise ArtifactError(base.place, problem, fix)
