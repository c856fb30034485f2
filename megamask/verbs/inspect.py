"""The verb inspect: verify a mask file, or a snapshot, strictly and say what is in it."""

from __future__ import annotations

from megamask.config import Config, run_paths
from megamask.errors import ConfigError
from megamask.masks.verify import check_strictly, configured_masks, summary


def run(config: Config) -> None:
    """Verify export.mask, or the learned mask of the run, against model.hf if that is there, and
    print a table.
    """
    hf_dir = run_paths(config).hf
    known = (hf_dir / "config.json").exists()
    masks = configured_masks(config)
    if masks is None:
        raise ConfigError(
            "export.mask", "dense", "a mask file", "There is nothing to inspect without a mask."
        )
    check_strictly(masks, hf_dir if known else None)
    print(summary(masks))
    print(
        f"{masks.path}: valid"
        + (f", belongs to {hf_dir}" if known else f" (no model in {hf_dir} to compare with)")
    )
