"""Which masks, and which weights under them, a row of results or a folder stands for.

What masks and weights were made from is written into the header of the mask file and into the note
beside the weights, so that neither is taken for the result of other settings or other text.

A mask whose weights were updated with it, or recovered under it, has the digest of the same mask on
the frozen weights. So rows, cards and reports tell them apart by the functions here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megamask.config.published import without_places
from megamask.masks.file import MaskSet
from megamask.weights.model_identity import OTHER_PARTS, is_model_of

MEASURED = ("seconds", "raised_damp")  # of a header's data: what came out, not what was asked for
OUTSIDE_DATA = ("fingerprint", "pattern", "linears")  # of a recipe: elsewhere in a header
RECOVERED = "recovered"  # of a header's data: how the kept weights were recovered
OF_ANOTHER_RUN = "of_another_run"  # of a recovery: whether its mask lies outside the run
PRIOR_SHA256 = "prior_sha256"  # of a header's data: of the masks that learning started from
WAYS = ("polished", "dense inputs")  # behind the method in the name of a row: see ``ways_of``
NO_RECIPE = ("weights", OF_ANOTHER_RUN)  # of a recovery: what it is not made from


def recovery_of(header: Mapping[str, Any] | None) -> dict[str, Any]:
    """The facts of a recovery in the header of a mask file; {} where the weights are frozen."""
    data = (header or {}).get("data")
    about = data.get(RECOVERED) if isinstance(data, Mapping) else None
    return dict(about) if isinstance(about, Mapping) else {}


def recipe_of(header: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the masks of a header, or its recovered weights, were made from: its ``data`` without
    what was measured, the digest of recovered weights and where the mask lies.
    """
    data = (header or {}).get("data")
    known = dict(data) if isinstance(data, Mapping) else {}
    if about := recovery_of(header):
        known[RECOVERED] = {key: value for key, value in about.items() if key not in NO_RECIPE}
    return {key: value for key, value in known.items() if key not in MEASURED}


def belong_together(masks: MaskSet, note: Mapping[str, Any]) -> bool:
    """Whether masks and the weights with this note are one result: one base model, one method, one
    recipe, and the same linears with the same patterns. Another recipe of the same method gives
    other weights, under the same masks too.

    Args:
        masks: masks with weights of their own. Folders of absolute paths have no part in the
            comparison, because ``extract`` cuts them.
        note: beside the weights.
    """
    recipe = note.get("recipe")
    if not isinstance(recipe, Mapping):
        return False
    of_masks = {"pattern": masks.patterns.facts(), "linears": list(masks)}
    if any(recipe.get(key, value) != value for key, value in of_masks.items()):
        return False  # a recovery has neither: its recipe names the mask
    made_from = {key: value for key, value in recipe.items() if key not in OUTSIDE_DATA}
    about = (note.get("fingerprint"), note.get("method"), without_places(made_from))
    return about == (masks.fingerprint, masks.method, without_places(recipe_of(masks.meta)))


def way_to_remake(masks: MaskSet) -> str:
    """What the user can do where the weights that belong to masks are missing or are others."""
    verb = "recover" if recovery_of(masks.meta) else "prune"
    return (
        f"Run the verb {verb} again with the settings that {masks.path} was made with, or delete "
        f"the mask {masks.method} and run {verb} in the run of that mask."
    )


def recovered_label(header: Mapping[str, Any] | None) -> str:
    """``recovered (MASK + METHOD)`` for the header of a recovered model; else ""."""
    about = recovery_of(header)
    return f"{RECOVERED} ({about.get('mask')} + {about.get('method')})" if about else ""


def outdated(header: Mapping[str, Any] | None, now: MaskSet | None) -> str:
    """Why a recovered model is no result of the mask whose name it has; "" where it is one, and
    where the weights are frozen.

    Args:
        header: of the recovered model's mask file.
        now: the mask of that name which the run has; None where it has none.
    """
    about = recovery_of(header)
    is_own = not about.get(OF_ANOTHER_RUN)
    if not about or now is None or not is_own or now.content_sha256 == about.get("mask_sha256"):
        return ""
    return f"was recovered under another mask {about.get('mask')} than the run has now"


def row_name(name: str, header: Mapping[str, Any] | None) -> str:
    """The name of a row of results.

    The row of a recovered model says that it is one, under whatever name the user asked for it, so
    that no table, picture or file shows it as a result of the frozen weights. So does the row of a
    one-shot mask that was made in another way than its method's name says, unless the user named
    the row.

    Args:
        name: the name that the user or the mask file gave.
        header: of the masks.
    """
    label, own = recovered_label(header), (header or {}).get("method")
    if not label:
        return ", ".join([name, *ways_of(header)] if name == own else [name])
    return label if name == own else f"{name}, {label}"


def ways_of(header: Mapping[str, Any] | None) -> list[str]:
    """What the verb prune did beside the method: ["polished"], ["dense inputs"], both or none."""
    data = (header or {}).get("data")
    known = data if isinstance(data, Mapping) else {}
    did = (bool(known.get("polish")), known.get("inputs") == "dense")
    return [way for way, is_so in zip(WAYS, did, strict=True) if is_so]


def identity(masks: MaskSet) -> dict[str, str]:
    """The digest of the content of masks, the fingerprint of their base model, and where they have
    weights of their own, ``weights``: the fingerprint of recovered weights, or the method that
    updated them.
    """
    found = {"sha256": masks.content_sha256, "fingerprint": masks.fingerprint}
    if masks.has_own_weights:
        found["weights"] = str(recovery_of(masks.meta).get("weights", masks.method))
    return found


def why_no_row_of(
    masks: MaskSet, results: Mapping[str, Any], row: str, model: Mapping[str, Any] | None = None
) -> str:
    """Why a row of a file of results is no row of these masks on their weights; "" where it is one.

    Args:
        masks: the masks.
        results: the file, with ``masks``: row -> what ``identity`` gave when the row was measured.
        row: the name of the row.
        model: the digest of the base model, under its key; None or {} where it is not known.
    """
    if not is_model_of(results, model or {}):
        return f"was measured on another model: {OTHER_PARTS}"
    made = results.get("masks")
    about = made.get(row) if isinstance(made, Mapping) else None
    wanted = identity(masks)
    if about == wanted:
        return ""
    if not isinstance(about, Mapping) or not wanted.keys() <= about.keys():
        return "does not say its mask"
    return "was measured on another mask"
