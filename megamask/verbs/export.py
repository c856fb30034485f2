"""The verb export: a model and a mask file become a masked folder that plain transformers, or
Megatron-LM, loads; or the mask becomes a file of another tool.
"""

from __future__ import annotations

from pathlib import Path

from megamask.config import Config, run_paths
from megamask.errors import ArtifactError, ConfigError
from megamask.export.folded import STAMP
from megamask.export.formats import FORMATS
from megamask.masks.file import MaskSet
from megamask.masks.find import check_named_weights, own_weights
from megamask.masks.verify import check_configured, check_strictly, configured_masks
from megamask.prepare.same_model import check_converted, check_given_weights
from megamask.weights.base_model import BaseModel, base_model
from megamask.weights.dist_checkpoint.megatron_args import refuse_parts
from megamask.weights.own_folder import check_output
from megamask.weights.side_files import check_side_files
from megamask.weights.source import WeightSource


def run(config: Config) -> None:
    """Write ``run_paths(config).export`` in the format export.format, from the base model (or
    export.weights) and export.mask, and verify the written files.

    Raises:
        ConfigError, ArtifactError: the mask is of another pattern or model, weights and mask are of
            two results or models, a folder is incomplete or cannot be written, config or tokenizer
            is a link to a place outside the model, or the format holds masks alone and others are
            asked for.
    """
    paths, base = run_paths(config), base_model(config)
    chosen = FORMATS[config.export.format]
    if not chosen.holds_weights:
        _require_mask_alone(config)
    check_output(paths.export, STAMP, "export.out", base)
    if chosen.holds_weights:
        check_side_files(base.hf_dir)
    if config.export.format == "megatron":
        refuse_parts(base.architecture(), "export.format", "megatron", "Set export.format=hf.")
    with base.open() as source:
        masks = configured_masks(config)
        if masks is not None:
            check_strictly(masks, base)
            check_configured(masks, base.architecture(), config)
        check_converted(base, paths.weights)
        weights = _weights_of(config, masks)
        if weights is None or not chosen.holds_weights:
            chosen.write(base, paths.export, source, masks)
            return
        with open_own(weights, base) as own:
            _weights_of(config, masks)  # they may have been replaced before they were opened
            if masks is not None and not masks.has_own_weights:
                check_given_weights(weights, own, base)
            chosen.write(base, paths.export, own, masks)


def _weights_of(config: Config, masks: MaskSet | None) -> Path | None:
    """The Megatron weights that are exported; None for those of the model.

    Raises:
        ArtifactError: they do not belong to the masks.
    """
    if config.export.weights:
        weights = Path(config.export.weights)
        check_named_weights(weights, masks)
        return weights
    return None if masks is None else own_weights(masks, run_paths(config))


def _require_mask_alone(config: Config) -> None:
    """Refuse settings of weights where the format holds masks alone.

    Raises:
        ConfigError: there is such a setting.
    """
    fix = f"export.format={config.export.format} holds a mask and no weight; hf and megatron do."
    if config.export.mask == "dense":
        raise ConfigError("export.mask", "dense", "a mask", fix)
    if config.export.weights is not None:
        raise ConfigError("export.weights", config.export.weights, "null", fix)


def open_own(weights: Path, base: BaseModel) -> WeightSource:
    """The Megatron weights that are exported in the place of the model's.

    Raises:
        ArtifactError: they are missing, torn, or of another model.
    """
    if not weights.is_dir():
        fix = "Point export.weights at Megatron weights that convert made, or leave it null."
        raise ArtifactError(weights, "is missing", fix)
    check_converted(base, weights)
    return base.of_weights(weights, "Run the verb convert again.")
