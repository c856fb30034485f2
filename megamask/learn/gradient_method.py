"""The methods that learn by gradient descent through relaxed masks: ``subset`` and ``categorical``.

They differ in the distribution alone (MaskLLM, arXiv 2409.17481, has the categorical one).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from megamask.config import Config
from megamask.config.learn_tree import LearnSection, SamplingSection
from megamask.errors import ConfigError
from megamask.learn.method import (
    GRADIENTS,
    HARD_CODES,
    KEPT,
    LOGITS,
    MICRO_BATCH,
    MOMENTS,
    STEP_GRADIENTS,
    WEIGHTS,
    WIDTH,
    Method,
    StateOf,
    TrialUpdate,
    keys_of,
)
from megamask.model.build import DTYPES
from megamask.optim.optimizers import decay_rates, epsilon, find_rule, section_for
from megamask.optim.requirements import check_optimizer
from megamask.optim.schedule import learning_rates
from megamask.sparsity.distribution import Distribution
from megamask.sparsity.draw import Site
from megamask.sparsity.pattern import Pattern

if TYPE_CHECKING:
    from megamask.learn.learner import Learner
    from megamask.learn.masked_model import MaskedModel
    from megamask.parallel.mesh import Mesh


class GradientMethod(Method):
    """Gradient descent on the logits of ``distribution``, under the name of the distribution."""

    def __init__(self, distribution: Distribution) -> None:
        self.name, self.distribution = distribution.name, distribution

    def check_settings(self, config: Config, pattern: Pattern) -> None:
        """Check the schedules."""
        check_schedules(config.learn.sampling)

    def check(self, config: Config, pattern: Pattern) -> None:
        """Check the optimizer too."""
        check_optimizer(config)
        super().check(config, pattern)

    def build(self, config: Config, mesh: Mesh, masked_model: MaskedModel) -> Learner:
        """The Gumbel-softmax learner."""
        from megamask.learn.gumbel import GradientLearner

        return GradientLearner(config, mesh, masked_model)

    def state_bytes(self, run: StateOf) -> dict[str, float]:
        """Bytes per prunable weight by part, with r logits per weight (1.5 for categorical 2:4, 1
        for subset):

        - frozen weights: 2 (bf16) or 4 (fp32).
        - mask logits: 4 r (fp32) or 2 r (bf16).
        - gradients: the buffer in which micro-batches add up, 4 r or 2 r. The gradient of one layer
          that exists for a moment on top of the buffer is no state.
        - optimizer moments: r times the ``moment_bytes`` of the update rule. Tables of 256 entries
          and step counters do not grow with the weights. With ``learn.optimizer.distributed`` a
          replica keeps ``moments_share`` of the moments.
        - hard masks: two codes per group (initial and latest), unless ``learn.state.track_flips``
          is off. A code takes 1 byte; for subset 2 bytes from M = 9 on, 4 bytes from M = 17 on.
        - masked weights: the width of a weight where every layer keeps its masked weight between
          the passes: with masked_weight=keep, or where micro-batches share masks
          (``learn.sampling.draws``), which live for all of these micro-batches.
          ``parallel.recompute`` drops ``redrawn_share`` of them with a draw per micro-batch.
        - gradients at the masked weights: shared masks alone. 4 (fp32) where several micro-batches
          of a replica add up and ``learn.state.grads`` is fp32, else the width of a weight.

        Categorical 2:4 in bf16 takes 26.5 bytes by default (26 without hard masks), 14.5 lean and
        9.5 leanest, masked weights left out.
        """
        state, weight = run.learn.state, float(WIDTH[run.dtype])
        per_group, logits = self._logits(run)
        code = self.distribution.code_dtype(run.pattern).itemsize / run.pattern.m
        moments = find_rule(run.learn.optimizer.kind).moment_bytes(state.logits, per_group)
        is_shared = run.learn.sampling.span > 1
        most = max(run.learn.sampling.uses(run.accumulations, run.replicas), default=0)
        sums_in_fp32 = most > 1 and state.grads == "fp32"
        kept = weight * (1.0 - run.redrawn_share) if state.masked_weight == "keep" else 0.0
        return {
            WEIGHTS: weight,
            LOGITS: WIDTH[state.logits] * logits,
            GRADIENTS: WIDTH[state.grads] * logits,
            MOMENTS: moments * logits * _share(run),
            HARD_CODES: 2 * code if state.track_flips else 0.0,
            KEPT: weight if is_shared else kept,
            STEP_GRADIENTS: (WIDTH["fp32"] if sums_in_fp32 else weight) if is_shared else 0.0,
        }

    def saved_bytes(self, run: StateOf) -> float:
        """Logits, and moments in the form that a snapshot holds."""
        per_group, logits = self._logits(run)
        dtype = run.learn.state.logits
        moments = find_rule(run.learn.optimizer.kind).saved_bytes(dtype, per_group)
        return logits * (WIDTH[dtype] + moments * _share(run))

    def copied_bytes(self, run: StateOf) -> float:
        """Moments that a snapshot holds in another form than the optimizer."""
        copies = find_rule(run.learn.optimizer.kind).copied_bytes()
        return self._logits(run)[1] * copies * _share(run)

    def _logits(self, run: StateOf) -> tuple[int, float]:
        """Logits per group and per weight."""
        per_group = self.distribution.logits_per_group(run.pattern)
        return per_group, per_group / run.pattern.m

    def try_update(self, config: Config, device: torch.device) -> None:
        """A step of the update rule, where the rule asks for it."""
        learn = config.learn
        find_rule(learn.optimizer.kind).try_out(device, DTYPES[learn.state.logits])

    def trial_update(
        self,
        config: Config,
        site: Site,
        logits: torch.Tensor,
        gradient: torch.Tensor,
        backend: str,
    ) -> TrialUpdate | None:
        """A step of the optimizer, whose kernels give the bits of plain PyTorch on CPUs. On CUDA
        PyTorch's roots and products may round otherwise, and a code or bf16 become its neighbour.
        """
        learn = config.learn
        rule = find_rule(learn.optimizer.kind)
        if not rule.has_kernels(learn.state.logits):
            return None

        def make(use_kernels: bool) -> list[torch.Tensor]:
            linear: Any = SimpleNamespace(
                mask_logits=torch.nn.Parameter(logits.clone()), parameter_id=1, site=site
            )
            linear.mask_logits.main_grad = gradient.clone()
            optimizer = rule.build(
                section_for(config),
                [linear],
                config.seed,
                use_kernels=use_kernels,
                logits_dtype=learn.state.logits,
                epsilon=epsilon(learn.optimizer, logits.numel()),
            )
            optimizer.step(0, 1e-3, torch.tensor(0.5, device=logits.device))
            return [linear.mask_logits.detach(), *optimizer.state_tensors()]

        neighbours = 2.0**-6  # bf16's are 2^-7 to 2^-8 apart, codes 1/127 of the largest
        return TrialUpdate(rule.name, make, 0.0 if logits.device.type == "cpu" else neighbours)

    def unused_settings(self, learn: LearnSection) -> set[str]:
        """The settings of the policy gradient, and those of distillation where there is none.
        Micro-batches that share a mask share its masked weights too, which are kept then.
        """
        unused = keys_of(learn, "maskpro")
        if learn.distillation.share == 0:
            unused |= {"learn.distillation.temperature", "learn.distillation.top_k"}
        if not find_rule(learn.optimizer.kind).has_epsilon:
            unused |= {"learn.optimizer.epsilon"}
        if learn.optimizer.schedule == "constant":
            unused |= {"learn.optimizer.min_lr"}
        if learn.prior.mask is None:
            unused |= {"learn.prior.strength", "learn.prior.margins"}
        if learn.sampling.span > 1:
            unused |= {"learn.state.masked_weight"}
        return unused

    def derived(self, config: Config) -> dict[str, float]:
        """The learning rate and the decay of the mean gradient, where they were not given, and the
        micro-batch where noise is drawn for each.
        """
        learn = config.learn
        found: dict[str, float] = {}
        if learn.optimizer.lr is None:
            found["learn.optimizer.lr"] = learning_rates(config)[0]
        if learn.optimizer.betas is None:
            found["learn.optimizer.betas[0]"] = decay_rates(config)[0]
        if learn.sampling.noise and learn.sampling.draws != "step":
            found[MICRO_BATCH] = learn.micro_batch
        return found

    def announcement(self, config: Config) -> str:
        """The learning rates, which may be derived."""
        highest, lowest = learning_rates(config)
        falls = config.learn.optimizer.schedule != "constant"
        return f"learning rate {highest:.2g}" + (f", falling to {lowest:.2g}" if falls else "")


def _share(run: StateOf) -> float:
    """The share of the moments that one replica holds."""
    return run.moments_share if run.learn.optimizer.distributed else 1.0


def check_schedules(section: SamplingSection) -> None:
    """Check that sampling ends harder than it began.

    Raises:
        ConfigError: tau rises, kappa falls or ends at 0, or begins at 0 by equal factors.
    """
    tau, kappa = section.tau, section.kappa
    if tau[1] > tau[0]:
        fix = "Write the larger number first."
        raise ConfigError("learn.sampling.tau", list(tau), "a temperature that falls", fix)
    if kappa[1] < kappa[0]:
        fix = "Write the smaller number first."
        raise ConfigError("learn.sampling.kappa", list(kappa), "a scale that grows or stays", fix)
    if kappa[1] == 0:
        allowed = "must end above 0: no logit counts at 0"
        fix = "Write, for example, [100, 500]."
        raise ConfigError("learn.sampling.kappa", list(kappa), allowed, fix)
    if section.schedule == "exponential" and kappa[0] == 0:
        allowed = "must begin above 0 with learn.sampling.schedule=exponential"
        fix = "Write, for example, [1, 500], or learn.sampling.schedule=linear."
        raise ConfigError("learn.sampling.kappa", list(kappa), allowed, fix)
