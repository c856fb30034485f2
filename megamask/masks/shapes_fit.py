"""Whether masks find linears of their names, shapes and patterns, and the message when they do
not.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from megamask.errors import ArtifactError
from megamask.sparsity.pattern_plan import PatternPlan

Shapes = Mapping[str, tuple[int, ...]]


def check_shapes(
    path: Path | str, masks: Shapes, model: Shapes, what: str = "model", near: str | None = None
) -> None:
    """Check that every mask has a linear of its name and shape. A linear without a mask is dense.

    Args:
        path: the mask file, for messages.
        masks: name -> (O, I) of the masks.
        model: name -> (O, I) of the model's linears.
        what: a noun for the model, such as its class.
        near: the name in the model that is most like that of the first mask without a linear; None
            looks for the name among the linears.

    Raises:
        ArtifactError: the first mask that has no linear; the message says what the model has.
    """
    fix = "Use the model that the mask was made for."
    missing = [name for name in masks if name not in model]
    if missing:
        if near is None:
            near = next(iter(difflib.get_close_matches(missing[0], list(model), 1, 0)), "")
        found = f"of its {len(masks)} linears the {what} has {len(masks) - len(missing)}"
        found += f"; the nearest name is {near}" if near else ""
        problem = f"has a mask of {missing[0]}, which is no linear of the model: {found}"
        raise ArtifactError(path, problem, fix)
    for name, shape in masks.items():
        if tuple(model[name]) != tuple(shape):
            shapes = f"{tuple(shape)}, the model's linear {tuple(model[name])}"
            raise ArtifactError(path, f"mask of {name} has shape {shapes}", fix)


def check_patterns(path: Path | str, masks: PatternPlan, wanted: PatternPlan) -> None:
    """Check that every mask has the pattern that is wanted of its linear; a linear that is dense in
    one of the two plans is not compared.

    Args:
        path: the mask file, for messages.
        masks: the patterns of its masks.
        wanted: the patterns that they must have.

    Raises:
        ArtifactError: the first mask of another pattern.
    """
    for name, pattern in masks.items():
        if name not in wanted or wanted[name] == pattern:
            continue
        if masks.only is not None and wanted.only is not None:
            fix = f"Set pattern={pattern}, or use a mask made for {wanted}."
            raise ArtifactError(path, f"holds {pattern} masks, wanted {wanted}", fix)
        fix = "Set pattern and pattern_overrides as the mask was made with, or use another mask."
        problem = f"holds a {pattern} mask of {name}, wanted {wanted[name]}"
        raise ArtifactError(path, problem, fix)
