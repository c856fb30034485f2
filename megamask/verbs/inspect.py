"""The verb inspect: verify a mask file or a snapshot strictly, and print a table of its facts."""

from __future__ import annotations

from megamask.config import Config
from megamask.errors import ConfigError
from megamask.masks.find import open_masks
from megamask.masks.verify import check_strictly, summary
from megamask.terminal import tell
from megamask.verbs.own_arguments import InspectArguments
from megamask.weights.base_model import CONFIG, base_model


def run(config: Config, arguments: InspectArguments) -> None:
    """Verify a mask, against the base model if that is there, and print a table.

    Raises:
        ConfigError: export.mask asks for a model without a mask.
        ArtifactError: the mask is missing, torn, or of another model.
    """
    base = base_model(config)
    known = base.megatron is not None or (base.hf_dir / CONFIG).exists()
    if arguments.mask is None and config.export.mask == "dense":
        raise ConfigError(
            "export.mask", "dense", "a mask file", "There is nothing to inspect without a mask."
        )
    masks = open_masks(arguments.mask or config.export.mask or "learned", config)
    check_strictly(masks, base if known else None)
    tell(summary(masks))
    alone = f" (no model in {base.hf_dir} to compare with)"
    tell(f"{masks.path}: valid{f', belongs to {base.place}' if known else alone}")
