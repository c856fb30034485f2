"""The verb inspect: verify a mask file, or a snapshot, strictly and say what is in it."""

from __future__ import annotations

import math
from pathlib import Path

from megamask.config import Config
from megamask.masks.file import MaskSet, load_masks
from megamask.masks.find import open_masks
from megamask.weights.architecture import read_architecture
from megamask.weights.fingerprint import fingerprint_hf
from megamask.weights.mapping import linear_shapes


def configured_masks(config: Config) -> MaskSet | None:
    """The masks that export.mask names; None for ``dense``.

    Raises:
        ArtifactError: missing or torn.
    """
    return (
        None
        if config.export.mask == "dense"
        else open_masks(config.export.mask or "learned", config)
    )


def verify(path: Path | str, hf_dir: Path | str | None = None) -> MaskSet:
    """Decode every mask of a file; with ``hf_dir``, also check names, shapes and fingerprint
    against that model.

    Raises:
        ArtifactError: what is wrong.
    """
    masks = load_masks(path)
    check_strictly(masks, hf_dir)
    return masks


def check_strictly(masks: MaskSet, hf_dir: Path | str | None = None) -> None:
    """Decode every mask; with ``hf_dir``, also check names, shapes and fingerprint against that
    model.

    Raises:
        ArtifactError: what is wrong.
    """
    if hf_dir is not None:
        masks.check(shapes=linear_shapes(read_architecture(Path(hf_dir))))
        masks.check(fingerprint=fingerprint_hf(Path(hf_dir)))
    masks.verify()


def summary(masks: MaskSet) -> str:
    """Name-value lines: method, pattern, density, linears, bits per weight, size, base model."""
    weights = sum(math.prod(masks.shape(name)) for name in masks)
    facts = {
        "method": masks.method,
        "pattern": f"{masks.pattern} ({masks.pattern.num_candidates} candidates a group)",
        "density": f"{masks.pattern.density:.4g}",
        "linears": f"{len(masks)}",
        "weights": f"{weights:,}",
        "bits per weight": f"{8 * masks.size / weights:.3f}" if weights else "-",
        "size": f"{masks.size:,} bytes",
        "base model": masks.fingerprint[:12],
        "data": masks.meta.get("data"),
        "evaluation": masks.meta.get("evaluation"),
        "written by": f"megamask {masks.meta['megamask']}" if "megamask" in masks.meta else None,
    }
    return "\n".join(f"{name:<16} {value}" for name, value in facts.items() if value is not None)
