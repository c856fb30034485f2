"""The verb import: masks of another tool and their base model become a mask file."""

from __future__ import annotations

from pathlib import Path

from megamask.config import Config
from megamask.errors import ArtifactError
from megamask.masks.find import new_mask_file
from megamask.masks.foreign.importing import import_masks
from megamask.verbs.own_arguments import ImportArguments
from megamask.weights.base_model import base_model


def run(config: Config, arguments: ImportArguments) -> None:
    """Write the masks of ``arguments.source`` to the mask file ``arguments.out``.

    Raises:
        ConfigError: the file is there already, or has another ending than .safetensors.
        ArtifactError: the source is damaged or does not fit the base model, or the folder of the
            file cannot be written.
    """
    usage = "megamask import mask_compressed.npz mask.safetensors --base models/base"
    out = new_mask_file("OUT", arguments.out, usage)
    base, overrides = base_model(config), config.pattern_overrides
    if config.model.hf is None and base.megatron is None and not base.hf_dir.exists():
        raise ArtifactError(base.hf_dir, "is missing", f"Name the base model: {usage}.")
    import_masks(Path(arguments.source), out, base, config.pattern, overrides)
