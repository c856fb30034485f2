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
from megamask.masks.identity import recovery_of

log = logging.getLogger(__name__)
TEXT = ("text_sha256", "calibration")  # what a header's data tells of the text that was read
MASK_TEXT = "mask_text"  # of a header's facts of a recovery: the text that its mask was made from


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
    """Whether the header of a mask file names the training text of the shards, or none. A recovery
    names its own text and that of its mask.
    """
    for read in (meta.get("data"), recovery_of(meta).get(MASK_TEXT)):
        learned = _inner(read, "text_sha256", domain)
        calibrated = _inner(read, "calibration", "shards_sha256", domain)
        if learned not in (None, shards.content_sha256(TRAIN)):
            return False
        if calibrated not in (None, shards.digests(TRAIN)):
            return False
    return True


def _inner(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
