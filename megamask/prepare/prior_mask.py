"""The prior mask of a run: opened by name or path, checked against pattern, model and the linears
to prune.
"""

from __future__ import annotations

from megamask.config import Config, RunPaths, run_paths
from megamask.config.paths import LEARNED, LEARNED_BEST
from megamask.errors import ArtifactError, ConfigError
from megamask.masks.file import MaskSet
from megamask.masks.find import mask_path, open_masks
from megamask.masks.identity import row_name
from megamask.sparsity.pattern_plan import PatternPlan
from megamask.storage import real_path
from megamask.weights.architecture import Architecture
from megamask.weights.mapping import linear_shapes

KEY = "learn.prior.mask"


def load_prior(
    config: Config,
    arch: Architecture,
    fingerprint: str,
    plan: PatternPlan,
) -> MaskSet | None:
    """The masks that ``learn.prior.mask`` names; None when it is null.

    Args:
        config: names the prior and the run.
        arch: the model.
        fingerprint: of the model's weights.
        plan: the linears to prune, each of which needs a mask of its pattern.

    Raises:
        ArtifactError: missing, torn, or made for another pattern, model or set of linears.
        ConfigError: a snapshot or a learned mask of this very run.
    """
    name = config.learn.prior.mask
    if name is None:
        return None
    paths = run_paths(config)
    place = real_path(mask_path(name, paths))
    own = [real_path(paths.mask(one)) for one in (LEARNED, LEARNED_BEST)]
    if place in own or place.is_relative_to(real_path(paths.learn)):
        allowed = (
            "a one-shot mask, a mask file, or a mask or snapshot of another run: those that this "
            "run learns are replaced while it learns"
        )
        fix = "Set another run_dir, or write it to a mask file first: megamask extract."
        raise ConfigError(KEY, name, allowed, fix)
    masks = open_masks(name, config, arch)
    masks.check(plan=plan, shapes=linear_shapes(arch), fingerprint=fingerprint)
    missing = [module for module in plan if module not in masks]
    if missing:
        problem = f"has no mask for {missing[0]}" + (
            f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        )
        raise ArtifactError(
            masks.path,
            problem,
            "Use the model.include and model.exclude that it was made with, or another prior.",
        )
    return masks


def description(prior: MaskSet, paths: RunPaths) -> str:
    """How the prior was made, and the name of its file unless it is a mask of this run. Masks that
    are published hold this text, so it names no folder.
    """
    made = row_name(prior.method, prior.meta)
    return made if prior.path == paths.mask(prior.method) else f"{made}, {prior.path.name}"
