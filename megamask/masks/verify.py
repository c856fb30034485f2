"""Strict checks of a mask file or a snapshot, and a summary of its content."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megamask.config import Config
from megamask.config.changed import CHANGES, read_changes
from megamask.errors import ArtifactError, printable
from megamask.masks.arguments import as_path, as_texts
from megamask.masks.base_weights import stored_weights
from megamask.masks.codings import coding_of
from megamask.masks.file import MaskSet, load_masks
from megamask.masks.find import open_masks
from megamask.masks.identity import recovered_label
from megamask.weights.base_model import BaseModel
from megamask.weights.family import Architecture
from megamask.weights.layer_plan import patterns_of
from megamask.weights.mapping import linear_shapes


def configured_masks(config: Config) -> MaskSet | None:
    """The masks that ``export.mask`` names; None for ``dense``.

    Raises:
        ArtifactError: the masks are missing or torn.
    """
    if config.export.mask == "dense":
        return None
    return open_masks(config.export.mask or "learned", config)


def verify(
    path: Path | str, hf_dir: Path | str | None = None, ignore_keys: Sequence[str] = ()
) -> MaskSet:
    """Open a mask file and check it strictly: every mask is decoded, and names, shapes and
    fingerprint are compared with a model.

    Args:
        path: the mask file.
        hf_dir: Hugging Face folder of the model; None compares with no model.
        ignore_keys: keys of its config.json that are unknown and may be ignored, as
            ``model.ignore_keys``.

    Raises:
        ArgumentError: an argument has another type.
        ArtifactError: the file is missing or torn, or a mask does not fit the model.
    """
    file = as_path("verify: path", path)
    folder = None if hf_dir is None else as_path("verify: hf_dir", hf_dir)
    ignored = as_texts("verify: ignore_keys", ignore_keys)
    masks = load_masks(file)
    base = None if folder is None else BaseModel(folder, ignore_keys=ignored)
    if base is not None and masks.lacks_weights:
        shapes = {name: masks.shape(name) for name in masks}
        masks = masks.with_weights(stored_weights(base, file, shapes, masks.fingerprints))
    check_strictly(masks, base)
    return masks


def check_strictly(masks: MaskSet, base: BaseModel | None = None) -> None:
    """Decode every mask, and compare names, shapes and fingerprint with a model.

    Args:
        masks: the masks.
        base: the model; None compares with no model.

    Raises:
        ArtifactError: a mask is corrupt or does not fit the model.
    """
    if base is not None:
        masks.check(shapes=linear_shapes(base.architecture()))
        masks.check(fingerprint=base.fingerprints().exact)
    masks.verify()


def _kept_weights(masks: MaskSet) -> str | None:
    """What weights the masks belong to; None for those of the base model."""
    if label := recovered_label(masks.meta):
        return f"{label}, not those of the base model"
    return f"updated by {masks.method}" if masks.has_own_weights else None


def check_configured(masks: MaskSet, arch: Architecture, config: Config) -> None:
    """Check that the masks have the patterns of the settings.

    Args:
        masks: the masks.
        arch: their model.
        config: has ``pattern`` and ``pattern_overrides``.

    Raises:
        ConfigError: the settings do not fit the model.
        ArtifactError: a mask has another pattern.
    """
    masks.check(plan=patterns_of(arch, config.pattern, config.pattern_overrides, masks))


def check_asked(masks: MaskSet, arch: Architecture, config: Config, fix: str = "") -> None:
    """As ``check_configured`` where the settings name a pattern. Where they name none, a verb that
    reads the pattern from the mask takes every mask.

    Args:
        masks, arch, config: as there.
        fix: what the user can do beside what the error says.

    Raises:
        ConfigError, ArtifactError: as there.
    """
    if config.model_fields_set.isdisjoint(("pattern", "pattern_overrides")):
        return
    try:
        check_configured(masks, arch, config)
    except ArtifactError as error:
        raise ArtifactError(error.path, error.problem, f"{error.fix} {fix}".strip()) from None


def pattern_facts(masks: MaskSet) -> dict[str, str]:
    """The pattern and the density; of several patterns, also how much of the masks has which."""
    if (only := masks.patterns.only) is not None:
        candidates = f"{only} ({only.num_candidates} candidates a group)"
        return {"pattern": candidates, "density": f"{only.density:.4g}"}
    shapes = {name: masks.shape(name) for name in masks}
    sizes, counts = masks.patterns.weights_of(shapes), Counter(masks.patterns.values())
    rows = {
        f"of {pattern}": f"{counts[pattern]} linears, {size / sum(sizes.values()):.1%} of the "
        f"weights, {pattern.num_candidates} candidates a group"
        for pattern, size in sizes.items()
    }
    density = f"{masks.patterns.density_of(shapes):.4g}"
    return {"pattern": str(masks.patterns), **rows, "density": density}


def summary(masks: MaskSet) -> str:
    """Lines of names and values: method, pattern, density, linears, size, base model and more."""
    data = masks.meta.get("data")
    changed = read_changes(data) if isinstance(data, dict) else []
    if changed and isinstance(data, dict):
        data = {key: value for key, value in data.items() if key != CHANGES}
    weights = sum(math.prod(masks.shape(name)) for name in masks)
    facts = {
        "method": masks.method,
        "kept weights": _kept_weights(masks),
        **pattern_facts(masks),
        "coding": ", ".join(sorted({coding_of(one) for one in masks.meta["tensors"].values()})),
        "linears": f"{len(masks)}",
        "weights": f"{weights:,}",
        "bits per weight": f"{8 * masks.size / weights:.3f}" if weights else "-",
        "size": f"{masks.size:,} bytes",
        "base model": masks.fingerprint[:12],
        "data": data,
        "evaluation": masks.meta.get("evaluation"),
        "written by": f"megamask {masks.meta['megamask']}" if "megamask" in masks.meta else None,
    }
    known = {name: value for name, value in facts.items() if value is not None}
    lines = [*known.items(), *(("changed", change) for change in changed)]
    return "\n".join(f"{name:<16} {printable(str(value))}" for name, value in lines)
