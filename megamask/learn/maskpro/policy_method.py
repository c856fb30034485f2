"""The method ``maskpro``: a policy gradient from the losses of drawn masks (arXiv 2506.12876)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from megamask.config import Config
from megamask.config.learn_tree import LearnSection
from megamask.data.blend import train_dataset
from megamask.errors import ConfigError
from megamask.learn.maskpro.samples import Reused
from megamask.learn.maskpro.score import add_scores_of, choose_score
from megamask.learn.method import (
    HARD_CODES,
    LOGITS,
    MICRO_BATCH,
    WEIGHTS,
    WIDTH,
    Method,
    StateOf,
    TrialUpdate,
    keys_of,
)
from megamask.sparsity.draw import Site
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.subset.subset import SUBSET

if TYPE_CHECKING:
    from megamask.learn.learner import Learner
    from megamask.learn.masked_model import MaskedModel
    from megamask.parallel.mesh import Mesh

FALSE = "Set it to false, or leave it out."
STARTS = "learn.method=maskpro starts from a prior mask and nothing else"


class PolicyMethod(Method):
    """Forward passes alone; a logit per weight, and a policy that draws N positions per group."""

    name, distribution = "maskpro", SUBSET
    implied: ClassVar[Mapping[str, Any]] = {"learn.sampling.mode": "hard"}

    def check_settings(self, config: Config, pattern: Pattern) -> None:
        """Check that the learner starts from a prior alone, draws, keeps fp32 logits and can
        score.
        """
        learn = config.learn
        if learn.state.logits != "fp32":
            allowed = "fp32 with learn.method=maskpro"
            fix = (
                "Leave out learn.memory and learn.state: this learner keeps no gradients and no "
                "moments anyway."
            )
            raise ConfigError("learn.state.logits", learn.state.logits, allowed, fix)
        if learn.prior.mask is None:
            fix = (
                "Name a one-shot method, a mask file or a snapshot, for example "
                "learn.prior.mask=sparsegpt."
            )
            raise ConfigError("learn.prior.mask", None, STARTS, fix)
        if learn.sampling.initial_noise:
            raise ConfigError("learn.sampling.initial_noise", True, STARTS, FALSE)
        if learn.sampling.noise != 1:
            allowed = "1 with learn.method=maskpro, whose scores are those of the noise's own law"
            fix = "Set it to 1, or leave it out."
            raise ConfigError("learn.sampling.noise", learn.sampling.noise, allowed, fix)
        if learn.prior.margins:
            raise ConfigError("learn.prior.margins", True, STARTS, FALSE)
        if learn.prior.strength == 0:
            allowed = "above 0 with learn.method=maskpro, or the prior would not show"
            fix = (
                "Leave it out: this learner sets the logits of the prior's weights to "
                "learn.maskpro.initial_logit."
            )
            raise ConfigError("learn.prior.strength", 0, allowed, fix)
        for name in ("share", "hidden"):
            value = getattr(learn.distillation, name)
            if value:
                allowed = "0 with learn.method=maskpro, which learns from the text alone"
                fix = "Set it to 0, or leave it out."
                raise ConfigError(f"learn.distillation.{name}", value, allowed, fix)
        choose_score(learn.maskpro.score, pattern)
        _check_masks(learn)

    def build(self, config: Config, mesh: Mesh, masked_model: MaskedModel) -> Learner:
        """The policy-gradient learner."""
        from megamask.learn.maskpro.policy_gradient import MaskPro

        return MaskPro(config, mesh, masked_model)

    def state_bytes(self, run: StateOf) -> dict[str, float]:
        """Weights, logits, and hard masks: those of flip tracking, and the initial mask. 6.75 bytes
        per weight at 2:4 in bf16.
        """
        code = self.distribution.code_dtype(run.pattern).itemsize / run.pattern.m
        logits = self.distribution.logits_per_group(run.pattern) / run.pattern.m
        return {
            WEIGHTS: WIDTH[run.dtype],
            LOGITS: WIDTH[run.learn.state.logits] * logits,
            HARD_CODES: (3 if run.learn.state.track_flips else 1) * code,
        }

    def forward_passes(self, learn: LearnSection) -> int:
        """One per mask that a micro-batch shows, and one of the mask that they are compared with,
        unless its losses are known from before.
        """
        section = learn.maskpro
        drawn = section.masks if section.data == "shared" else 1
        return drawn + int(section.baseline == "hard_mask" or section.samples is None)

    def trial_update(
        self,
        config: Config,
        site: Site,
        logits: torch.Tensor,
        gradient: torch.Tensor,
        backend: str,
    ) -> TrialUpdate | None:
        """The change that the scores of two drawn masks make. The kernels round otherwise than
        plain PyTorch.
        """
        kind = choose_score(config.learn.maskpro.score, site.pattern)

        def make(use_kernels: bool) -> list[torch.Tensor]:
            changed = logits.clone()
            add_scores = add_scores_of(backend if use_kernels else "torch")
            add_scores(changed, site.of_units, NoiseKey(0, 1), (0.5, -1.0), kind)
            return [changed - logits]

        # fp32 roundings are some 1e-6 of the largest score; a wrong score is off by its own size.
        return TrialUpdate(self.name, make, tolerance=1e-3)

    def samples(self, config: Config) -> Any:
        """A limited set of samples, learned from again and again."""
        learn = config.learn
        count = learn.maskpro.samples
        whole = count or learn.steps * learn.global_batch
        dataset = train_dataset(config, whole, config.data.seq_length, config.seed)
        return Reused(dataset, count, config.seed)

    def unused_settings(self, learn: LearnSection) -> set[str]:
        """The settings of gradient descent and of relaxed masks. Those that turn distillation on
        are refused instead.
        """
        sampling = ("mode", "draws", "kappa", "tau", "schedule", "annealed_by", "logit_std")
        unused = keys_of(learn, "optimizer", "distillation") | {
            "learn.weight_norm",
            "learn.prior.strength",
            "learn.state.grads",
            "learn.state.masked_weight",
            *(f"learn.sampling.{key}" for key in sampling),
        }
        return unused - {"learn.distillation.share", "learn.distillation.hidden"}

    def derived(self, config: Config) -> dict[str, float]:
        """The micro-batch: noise is drawn for each, and the masks of a step divide them."""
        return {MICRO_BATCH: config.learn.micro_batch}


def _check_masks(learn: LearnSection) -> None:
    section, micro_batches = learn.maskpro, learn.global_batch // learn.micro_batch
    if section.baseline == "leave_one_out" and section.masks < 2:
        allowed = "2 or more with learn.maskpro.baseline=leave_one_out"
        fix = (
            "Set learn.maskpro.masks to 2 or more, or learn.maskpro.baseline to tracker or "
            "hard_mask."
        )
        raise ConfigError("learn.maskpro.masks", section.masks, allowed, fix)
    if section.data == "split" and micro_batches % section.masks:
        allowed = (
            "a divisor of the step's micro-batches, learn.global_batch / learn.micro_batch = "
            f"{micro_batches}, with data=split"
        )
        fix = (
            "Change it or learn.global_batch, or show all masks the same samples with "
            "learn.maskpro.data=shared."
        )
        raise ConfigError("learn.maskpro.masks", section.masks, allowed, fix)
