"""The verb export: a Hugging Face folder and a mask file become a masked folder that plain
transformers loads.
"""

from __future__ import annotations

from pathlib import Path

from megamask.config import Config, run_paths
from megamask.errors import ConfigError
from megamask.export.masked_folder import STAMP, _weights, export
from megamask.masks.verify import check_strictly, configured_masks
from megamask.sparsity.pattern import Pattern
from megamask.storage import require_writable
from megamask.weights.hf_files import open_checked, require_own


def run(config: Config) -> None:
    """Write paths.export from model.hf (or export.weights) and export.mask, and verify what was
    written.

    Raises:
        ConfigError, ArtifactError: a mask of another pattern or model, a folder that is incomplete
            or cannot be written.
    """
    paths = run_paths(config)
    if paths.export.resolve() == paths.hf.resolve():
        raise ConfigError(
            "export.out",
            str(paths.export),
            "a folder other than model.hf",
            "The base model must stay as it is.",
        )
    require_own(paths.export, STAMP, "export.out")
    require_writable(paths.export.parent, "export.out")
    reader = open_checked(paths.hf)
    masks = configured_masks(config)
    if masks is not None:
        check_strictly(masks, paths.hf)
        masks.check(pattern=Pattern.parse(config.pattern))
    weights = Path(config.export.weights) if config.export.weights else None
    export(paths.hf, paths.export, _weights(reader, paths.hf, weights), masks)
