"""The dense model that masks are made for, loaded and looked over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megamask.errors import ArtifactError
from megamask.model.build import build_model, prunable_linears
from megamask.model.checkpoint import load_weights
from megamask.model.language_model import LanguageModel
from megamask.model.mask_shards import linear_rules, patterns_by_linear
from megamask.parallel.masked_linear import MaskedLinear
from megamask.parallel.mesh import Mesh
from megamask.prepare.run_inputs import RunInputs
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.pattern_plan import PatternPlan
from megamask.weights.architecture import Architecture


@dataclass(frozen=True)
class DenseModel:
    """The frozen model of one rank.

    Attributes:
        model: the model, with its weights, in ``config.dtype``.
        linears: the linears to prune, by Megatron name.
    """

    model: LanguageModel
    linears: dict[str, MaskedLinear]


def load_dense(inputs: RunInputs, mesh: Mesh) -> DenseModel:
    """Load the model, and refuse linears to prune that are pruned already.

    A one-shot criterion cannot judge weights that are zero, and no mask can be learned on weights
    that another mask removed.

    Raises:
        ConfigError: the architecture does not split over this layout.
        ArtifactError: weights that are missing, torn, or pruned already.
    """
    weights = inputs.paths.weights
    model = build_model(inputs.config, inputs.arch, mesh)
    linears = prunable_linears(model, inputs.config, inputs.arch)
    load_weights(model, weights)
    if found := pruned_already(linears, inputs.arch, inputs.plan, mesh):
        raise ArtifactError(
            weights,
            f"hold a model that is pruned already: {found}",
            "Convert the dense model, and name the mask as learn.prior.mask if it is to be "
            "learned from; or keep that linear out with model.exclude.",
        )
    return DenseModel(model, linears)


def pruned_already(
    linears: Mapping[str, MaskedLinear], arch: Architecture, plan: PatternPlan, mesh: Mesh
) -> str:
    """The first linear that is pruned already, "NAMES is N:M sparse", the same on all ranks; empty
    where none is. Weights that are pruned one by one are pruned for a pattern of pairs too. All
    ranks must call this function.
    """
    table, patterns = linear_rules(arch), patterns_by_linear(plan, arch)
    for name, linear in linears.items():
        single = Pattern(patterns[name].n, patterns[name].m)
        if mesh.any(single.already_fits(linear.weight)):
            return f"{', '.join(table[name].modules)} is {single} sparse"
    return ""
