"""What a learning run stands on: the frozen model under mask logits that start from the prior."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from megamask.config import Config
from megamask.learn.methods import find_method
from megamask.model.build import attach_logits
from megamask.model.checkpoint import float16_fingerprints
from megamask.model.language_model import LanguageModel
from megamask.model.mask_shards import linear_rules, local_shard, patterns_by_linear
from megamask.parallel.mask_context import MaskSwitch
from megamask.parallel.masked_linear import MaskedLinear
from megamask.parallel.mesh import Mesh
from megamask.prepare.dense_model import load_dense
from megamask.prepare.run_inputs import LearnInputs
from megamask.sparsity.initial_logits import initial_noise
from megamask.sparsity.margins import graded
from megamask.sparsity.pattern_plan import PatternPlan
from megamask.weights.architecture import Architecture
from megamask.weights.model_identity import model_facts_of
from megamask.weights.rule import Rule

log = logging.getLogger(__name__)
MARGIN_CAP = 2.0  # medians: clearer choices of the criterion are no surer


@dataclass
class MaskedModel:
    """The frozen model and the masks that are learned on it."""

    arch: Architecture
    fingerprint: str
    model: LanguageModel
    linears: dict[str, MaskedLinear]
    switch: MaskSwitch
    prior_method: str | None
    float16_fingerprints: tuple[str, ...] = ()
    digest: Mapping[str, str] = field(default_factory=dict)  # of the base model, under its key

    @property
    def plan(self) -> PatternPlan:
        """The patterns of the masks, by HF name."""
        table = linear_rules(self.arch)
        return PatternPlan(
            {
                module: linear.site.pattern
                for name, linear in self.linears.items()
                for module in table[name].modules
            }
        )

    @property
    def mask_logits(self) -> list[torch.nn.Parameter]:
        """The only trained parameters."""
        return [
            linear.mask_logits for linear in self.linears.values() if linear.mask_logits is not None
        ]


def build_masked_model(inputs: LearnInputs, mesh: Mesh) -> MaskedModel:
    """Load the model and initialise its mask logits.

    Raises:
        MegamaskError: a setting or an artefact that does not fit.
    """
    config, arch = inputs.config, inputs.arch
    dense = load_dense(inputs, mesh)
    linears = dense.linears
    switch = attach_logits(
        linears,
        patterns_by_linear(inputs.plan, arch),
        config.learn.sampling.backend,
        mesh.device,
        find_method(config.learn.method).distribution,
        config.learn.state.logits,
    )
    for name, linear in linears.items():
        _initialise(linear, config, mesh, _prior_of(inputs, linear_rules(arch)[name], mesh))
    return MaskedModel(
        arch,
        inputs.fingerprint,
        dense.model,
        linears,
        switch,
        inputs.prior_method,
        float16_fingerprints(inputs.note),
        model_facts_of(inputs.note),
    )


def _prior_of(inputs: LearnInputs, rule: Rule, mesh: Mesh) -> torch.Tensor | None:
    """This rank's shard of a linear's prior, (O, I): a mask, or its degrees."""
    if inputs.prior is None:
        return None
    mask_OI = local_shard(inputs.prior, rule, mesh)
    if inputs.margins is None:
        return mask_OI
    return graded(mask_OI, local_shard(inputs.margins, rule, mesh), MARGIN_CAP)


@torch.no_grad()
def _initialise(
    linear: MaskedLinear, config: Config, mesh: Mesh, prior_OI: torch.Tensor | None
) -> None:
    """pi = noise + std(pi) * sim * alpha (MaskLLM, Eq. 10); computed in fp32, then rounded to the
    dtype of the logits.
    """
    sampling, logits, std, spread = (
        config.learn.sampling,
        linear.mask_logits,
        config.learn.sampling.logit_std,
        0.0,
    )
    assert logits is not None
    site, distribution = linear.site, linear.site.distribution
    if not sampling.initial_noise:
        start = torch.zeros_like(logits, dtype=torch.float32)
    else:
        groups, number = logits.shape[-1], linear.parameter_id
        start = initial_noise(site, groups, std, config.seed, number, logits.device)
        spread = sampling.kappa[0] * std
        std = _layer_std(start, mesh) / distribution.noise_unit(site.pattern)
    if prior_OI is not None:
        start.add_(
            distribution.prior_bonus(
                prior_OI.to(logits.device),
                site.pattern,
                config.learn.prior.strength,
                std,
                spread,
            )
        )
    logits.copy_(start)


def _layer_std(logits: torch.Tensor, mesh: Mesh) -> float:
    """Standard deviation over the whole layer. The fp64 sums are rounded to fp32, so that the split
    does not show.
    """
    wide = logits.double()
    count = torch.tensor(float(wide.numel()), dtype=torch.float64, device=wide.device)
    total, squares, count = mesh.sum_over_tp(
        torch.stack([wide.sum(), wide.square().sum(), count])
    ).tolist()
    return float(torch.tensor((squares / count - (total / count) ** 2) ** 0.5, dtype=torch.float32))
