"""Masks whose training text is not the training text of the shards of today."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from megamask.config import Config, run_paths
from megamask.data.heldout import evaluated_domains
from megamask.data.shards import Shards, read_shards
from megamask.data.split import TRAIN
from megamask.masks.file import MaskSet

log = logging.getLogger(__name__)


def warn_of_learned_text(config: Config, masks: Mapping[str, MaskSet]) -> None:
    """Warn of masks that were made from other training text than the shards hold now: documents
    that are held out today may be among it. Mask files of before do not name their text.

    Args:
        config: names the domains that are evaluated, and the run.
        masks: name for the message -> masks.

    Raises:
        ArtifactError: shards are missing or torn.
    """
    folder = run_paths(config).shards
    for domain in evaluated_domains(config):
        shards = read_shards(folder / domain)
        for name, found in masks.items():
            if not _was_made_from(found.meta, domain, shards):
                said = "%s was made from other text of %s than %s holds now: documents that are "
                said += "held out may be among it"
                log.warning(said, name, domain, shards.folder)


def _was_made_from(meta: Mapping[str, Any], domain: str, shards: Shards) -> bool:
    """Whether the header of a mask file names the training text of the shards, or none."""
    learned = _inner(meta, "data", "text_sha256", domain)
    calibrated = _inner(meta, "data", "calibration", "shards_sha256", domain)
    is_learned = learned in (None, shards.content_sha256(TRAIN))
    return is_learned and calibrated in (None, shards.digests(TRAIN))


def _inner(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
