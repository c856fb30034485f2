"""What can be refused before a model is built: settings that cannot work, and inputs that do not
fit together.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from megamask import storage
from megamask.config import Config
from megamask.config.deciding import LEARN, changes
from megamask.config.learn_tree import LearnSection
from megamask.config.nested import flatten
from megamask.config.paths import RunPaths
from megamask.config.section import Section
from megamask.data.blend import blend_weights
from megamask.data.heldout import evaluated_domains
from megamask.learn.methods import find_method
from megamask.optim.optimizers import BETAS, same_decays
from megamask.prepare.run_inputs import LearnInputs

log = logging.getLogger(__name__)


def settings_without_effect(learn: LearnSection) -> set[str]:
    """Settings that change nothing under the method of the run, whatever their value is."""
    return find_method(learn.method).unused_settings(learn)


def learning_changes(before: Mapping[str, Any], now: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value before, value now) of the settings that decide what is learned and
    differ; see ``megamask.config.deciding.changes``. Decay rates that are given on one side and
    derived on the other do not differ where they are the same.
    """
    found = changes(before, now, LEARN, settings_without_effect(now.learn))
    if BETAS in found and same_decays(before, now):
        del found[BETAS]
    return found


def unused_settings(learn: LearnSection) -> list[str]:
    """The settings without effect that were given, by name of a preset or a memory too; but for
    those that say what the method does anyway.
    """
    given = {f"learn.{name}" for name in learn.model_fields_set} | {
        f"learn.{name}.{key}"
        for name, section in learn
        if isinstance(section, Section)
        for key in section.model_fields_set
    }
    values, implied = flatten({"learn": learn.model_dump()}), find_method(learn.method).implied
    said = {name for name, value in implied.items() if values[name] == value}
    return sorted((given & settings_without_effect(learn)) - said)


def require_places(paths: RunPaths) -> None:
    """Check every folder that the run writes into: the mask is written last, after hours.

    Raises:
        ArtifactError: the first folder that cannot be written.
    """
    storage.require_writable(paths.run_dir)
    for folder in (paths.masks, paths.learn, paths.learn / "snapshots"):
        if folder.exists() or folder.is_symlink():  # the others are made when they are needed
            storage.require_writable(folder)


def check_early(inputs: LearnInputs) -> None:
    """Everything that can be refused before the model is loaded: settings first, then files.

    Raises:
        MegamaskError: a setting, an input or an output folder that cannot work.
    """
    config = inputs.config
    inputs.layout.check_samples(config)
    method = find_method(config.learn.method)
    for pattern in inputs.patterns:
        method.distribution.logits_per_group(pattern)
    blend_weights(config)
    evaluated_domains(config)
    for pattern in inputs.patterns:
        method.check(config, pattern)
    require_places(inputs.paths)
    inputs.check()
    if unused := unused_settings(config.learn):
        learn = config.learn
        choice = (
            f"learn.method={learn.method}, learn.distillation.share={learn.distillation.share:g}"
        )
        log.warning("without effect here (%s): %s", choice, ", ".join(unused))
