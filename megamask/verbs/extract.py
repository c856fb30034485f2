"""The verb extract: write the hard masks of a snapshot, or a copy of any mask, as a mask file with
its margins.
"""

from __future__ import annotations

import logging

from megamask.config import Config
from megamask.config.paths import margins_path
from megamask.config.published import without_places
from megamask.masks.codings import GIVEN_WEIGHTS
from megamask.masks.file import load_masks, save_masks
from megamask.masks.find import new_mask_file, open_masks
from megamask.masks.margins import save_margins
from megamask.verbs.own_arguments import ExtractArguments
from megamask.weights.base_model import base_model

log = logging.getLogger(__name__)


def run(config: Config, arguments: ExtractArguments) -> None:
    """Write the masks of ``arguments.snapshot`` to the mask file ``arguments.file``.

    ``--coding`` chooses how the file stores them: see ``masks/codings.py``. Absolute paths in the
    header are cut to their last name. Margins go into FILE.margins, where the masks have any, so
    that the file is a prior like the masks themselves.

    Raises:
        ConfigError: the file is there already, or has another ending than .safetensors.
        ArtifactError: a mask or snapshot that is missing or torn, another base model, or a folder
            that cannot be written.
    """
    usage = "megamask extract runs/mine/learn/snapshots mask.safetensors"
    out = new_mask_file("FILE", arguments.file, usage)
    masks = open_masks(arguments.snapshot, config)
    margins = masks.margins() if masks.has_margins else None
    model = base_model(config) if arguments.coding == GIVEN_WEIGHTS else None
    save_masks(
        out,
        masks,
        masks.patterns,
        fingerprint=masks.fingerprint,
        method=masks.method,
        updated_weights=masks.has_own_weights,
        data=without_places(masks.meta.get("data")),
        evaluation=without_places(masks.meta.get("evaluation")),
        float16_fingerprints=masks.fingerprints[1:],
        coding=arguments.coding,
        model=model,
    )
    if margins is not None:
        shapes = {name: masks.shape(name) for name in masks}
        levels = ((name, margins.levels(name)) for name in masks)
        save_margins(margins_path(out), load_masks(out).content_sha256, shapes, levels)
    log.info(
        "wrote %s: %s masks of %d linears from %s", out, masks.patterns, len(masks), masks.path
    )
