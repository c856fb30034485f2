"""The verb extract: write the winners of a snapshot (or a copy of any mask) as a mask file."""

from __future__ import annotations

import logging
from pathlib import Path

from megamask.config import Config
from megamask.errors import ConfigError
from megamask.masks.file import save_masks
from megamask.masks.find import open_masks
from megamask.storage import require_writable

log = logging.getLogger(__name__)
USAGE = "Write megamask extract runs/mine/learn/snapshots mask.safetensors."


def run(config: Config) -> None:
    """Write ``extract.mask`` to the mask file ``extract.out``.

    Raises:
        ConfigError: one of them is not given, or there is a file already.
        ArtifactError: a mask or snapshot that is missing or torn.
    """
    source, target = config.extract.mask, config.extract.out
    if source is None or target is None:
        key, what = (
            ("extract.mask", "a snapshot to read")
            if source is None
            else ("extract.out", "a mask file to write")
        )
        raise ConfigError(key, None, what, USAGE)
    out = Path(target)
    if out.suffix != ".safetensors":
        raise ConfigError("extract.out", target, "a file whose name ends in .safetensors", USAGE)
    if out.exists():
        raise ConfigError(
            "extract.out",
            target,
            "a file that is not there yet",
            "Delete it, or choose another name.",
        )
    masks = open_masks(source, config)
    require_writable(out.parent, "extract.out")
    about = {key: masks.meta.get(key) for key in ("data", "evaluation")}
    save_masks(
        out,
        masks,
        masks.pattern,
        fingerprint=masks.fingerprint,
        method=masks.method,
        updated_weights=masks.has_own_weights,
        **about,
    )
    log.info("wrote %s: %s masks of %d linears from %s", out, masks.pattern, len(masks), masks.path)
