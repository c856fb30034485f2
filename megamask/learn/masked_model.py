"""What a learning run stands on: the frozen model under mask logits that start from the prior."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from megamask.config import Config, run_paths
from megamask.config.method_names import DISTRIBUTION_OF
from megamask.data.shards import check_vocabulary
from megamask.errors import ArtifactError
from megamask.learn.prior_mask import description, load_prior
from megamask.model.build import attach_logits, build_model, prunable_linears
from megamask.model.checkpoint import load_weights, read_note
from megamask.model.language_model import LanguageModel
from megamask.model.mask_shards import linear_rules, local_mask
from megamask.parallel.mask_context import MaskSwitch
from megamask.parallel.masked_linear import MaskedLinear
from megamask.parallel.mesh import Mesh
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.prior import initial_noise, prior_bonus, unit
from megamask.weights.architecture import Architecture, read_architecture

log = logging.getLogger(__name__)


@dataclass
class MaskedModel:
    """The frozen model and the masks that are learned on it."""

    arch: Architecture
    pattern: Pattern
    fingerprint: str
    model: LanguageModel
    linears: dict[str, MaskedLinear]
    switch: MaskSwitch
    prior_method: str | None

    @property
    def mask_logits(self) -> list[torch.nn.Parameter]:
        """The only trained parameters."""
        return [
            linear.mask_logits for linear in self.linears.values() if linear.mask_logits is not None
        ]


def build_masked_model(config: Config, mesh: Mesh) -> MaskedModel:
    """Load the model and initialise its mask logits.

    Raises:
        MegamaskError: a setting or an artefact that does not fit.
    """
    weights = run_paths(config).weights
    fingerprint: str = read_note(weights)["fingerprint"]
    arch, pattern = read_architecture(weights), Pattern.parse(config.pattern)
    check_vocabulary(config, arch.vocab)
    model = build_model(config, arch, mesh)
    linears = prunable_linears(model, config, arch)
    for name, linear in linears.items():
        linear.groups(pattern, name)
    prior = load_prior(config, arch, fingerprint)
    load_weights(model, weights)
    _refuse_sparse_weights(linears, pattern, arch, weights, mesh)
    switch = attach_logits(
        linears,
        pattern,
        config.learn.sampling.backend,
        mesh.device,
        config.learn.state.logits,
        DISTRIBUTION_OF[config.learn.method],
    )
    for name, linear in linears.items():
        _initialise(
            linear,
            config,
            mesh,
            None if prior is None else local_mask(prior, linear_rules(arch)[name], mesh),
        )
    return MaskedModel(
        arch,
        pattern,
        fingerprint,
        model,
        linears,
        switch,
        description(prior, config) if prior else None,
    )


@torch.no_grad()
def _initialise(
    linear: MaskedLinear, config: Config, mesh: Mesh, prior_mask_OI: torch.Tensor | None
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
    start = torch.zeros_like(logits, dtype=torch.float32)
    if sampling.initial_noise:
        start.copy_(
            initial_noise(linear.site, logits.shape[-1], std, config.seed, linear.parameter_id)
        )
        std, spread = _layer_std(start, mesh) / unit(linear.site), sampling.kappa[0] * std
    if prior_mask_OI is not None:
        start.add_(
            prior_bonus(
                prior_mask_OI.to(logits.device),
                linear.site,
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


def _refuse_sparse_weights(
    linears: dict[str, MaskedLinear],
    pattern: Pattern,
    arch: Architecture,
    weights: Path,
    mesh: Mesh,
) -> None:
    """A mask cannot be learned on weights that are already zero where another mask pruned them."""
    for name, linear in linears.items():
        if mesh.any(pattern.already_fits(linear.weight)):
            problem = f"hold a model that is pruned already: {', '.join(linear_rules(arch)[name].modules)} is {pattern} sparse"
            raise ArtifactError(
                weights,
                problem,
                "Convert the dense model, and name the mask as learn.prior.mask instead.",
            )
