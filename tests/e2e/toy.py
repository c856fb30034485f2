"""A distribution, an update rule and two methods from outside the package, in one file.

The toy distribution keeps a position with probability sigmoid(score - threshold), where the
threshold lies midway between the N-th and the next largest score of the group. Its soft masks need
not sum to N; its hard mask is the N largest logits, as for k-subsets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megamask.config import Config
from megamask.config.learn_tree import LearnSection
from megamask.data.batches import BatchPlan
from megamask.learn.learner import StepResult
from megamask.learn.masked_model import MaskedModel
from megamask.learn.method import LOGITS, WEIGHTS, Method, StateOf
from megamask.optim.base import MaskOptimizer, UpdateRule
from megamask.parallel.mask_context import Measured
from megamask.parallel.mesh import Mesh
from megamask.sparsity.draw import RETURNED, GradientSink, Sample, Sampled, Site, scores
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.subset.subset import Subset


class Sigmoid(Subset):
    """Positions one by one; everything but the soft masks is that of k-subsets."""

    name = "sigmoid"
    reference = "tests.e2e.toy"
    numba = None  # type: ignore[assignment]
    triton = None  # type: ignore[assignment]


SIGMOID = Sigmoid()


def soft_mask(mask_logits: torch.Tensor, site: Site, sample: Sample) -> torch.Tensor:
    """(O, I), differentiable by the logits."""
    score = scores(mask_logits.float(), site, sample)
    n = site.pattern.n
    falling = score.detach().sort(dim=1, descending=True).values
    threshold = (falling[:, n - 1 : n] + falling[:, n : n + 1]) / 2
    return (score - threshold).sigmoid().transpose(1, 2).flatten(1)


def forward(
    mask_logits: torch.Tensor,
    weight: torch.Tensor,
    site: Site,
    sample: Sample,
    statistics: bool = False,
) -> Sampled:
    masked = weight * soft_mask(mask_logits, site, sample).to(weight.dtype)
    codes, largest = mask_statistics(mask_logits, site, sample.kappa)
    norm = masked.double().square().sum()
    return Sampled(masked, torch.stack([norm, largest]), codes if statistics else codes[:0, 0])


def backward(
    grad: torch.Tensor,
    mask_logits: torch.Tensor,
    weight: torch.Tensor,
    site: Site,
    sample: Sample,
    sink: GradientSink = RETURNED,
) -> torch.Tensor:
    with torch.enable_grad():
        logits = mask_logits.detach().float().requires_grad_()
        soft_mask(logits, site, sample).backward(grad.float() * weight.float())
    assert logits.grad is not None
    return sink.put(logits.grad, mask_logits.dtype)


def mask_statistics(
    mask_logits: torch.Tensor, site: Site, kappa: float
) -> tuple[torch.Tensor, torch.Tensor]:
    kept = SIGMOID.hard_mask(mask_logits, site.pattern).unflatten(1, (-1, site.pattern.m))
    codes = (kept * 2 ** torch.arange(site.pattern.m)).sum(-1).to(site.code_dtype)
    return codes, torch.tensor(float(codes.numel()), dtype=torch.float64)


class SignDescent(MaskOptimizer):
    """p <- p - lr sign(g)."""

    @torch.no_grad()
    def step(self, step: int, rate: float, clip_factor: torch.Tensor) -> None:
        for logits in self.logits:
            logits.sub_(rate * logits.main_grad.sign())  # type: ignore[attr-defined]

    def state_tensors(self) -> list[torch.Tensor]:
        return []

    def moments(self) -> dict[str, list[torch.Tensor]]:
        return {}

    def load_moments(self, moments: dict[str, list[torch.Tensor]], steps: int) -> None:
        assert not moments


class SignRule(UpdateRule):
    name = "sign"

    def moment_bytes(self, logits_dtype: str, logits_per_group: int) -> float:
        return 0.0

    def build(self, section: Any, linears: Sequence[Any], seed: int, **_: Any) -> MaskOptimizer:
        return SignDescent(section, linears, seed)


class Shuffle:
    """A learner without a loss: every step permutes the positions of each group by one."""

    def __init__(self, masked_model: MaskedModel) -> None:
        self.masked_model, self.steps = masked_model, 0

    @torch.no_grad()
    def step(self, step: int, plan: BatchPlan) -> StepResult:
        self.steps += 1
        first_draw, nothing = {}, torch.zeros((), dtype=torch.float64)
        for linear in self.masked_model.linears.values():
            codes, largest = linear.mask_statistics(1.0)
            first_draw[linear.parameter_id] = Measured(nothing, largest, codes)
        for logits in self.masked_model.mask_logits:
            logits.copy_(logits.roll(1, dims=1))
        return StepResult(lm_loss=0.0, loss=0.0, lr=0.0, first_draw=first_draw)

    def state(self, logits: dict[str, Any], is_loading: bool = False) -> dict[str, Any]:
        return {"steps": self.steps}

    def load(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]


class ShuffleMethod(Method):
    name, distribution = "shuffle", SIGMOID

    def check_settings(self, config: Config, pattern: Pattern) -> None:
        pass

    def build(self, config: Config, mesh: Mesh, masked_model: MaskedModel) -> Shuffle:
        return Shuffle(masked_model)

    def state_bytes(self, run: StateOf) -> dict[str, float]:
        return {WEIGHTS: 2.0, LOGITS: 4.0}

    def unused_settings(self, learn: LearnSection) -> set[str]:
        return set()
