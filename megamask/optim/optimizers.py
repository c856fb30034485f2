"""The registry of update rules, and the way from the settings to an optimizer of the mask logits.

A new rule is one file with a class that derives from ``UpdateRule``, and one line in
``UPDATE_RULES``.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from megamask.config import Config
from megamask.config.learn_tree import OptimizerSection
from megamask.errors import ConfigError
from megamask.optim.adamw import AdamWRule
from megamask.optim.adamw_8bit import AdamW8bitRule
from megamask.optim.base import MaskOptimizer, UpdateRule
from megamask.optim.lion import LionRule
from megamask.optim.lion_8bit import Lion8bitRule

if TYPE_CHECKING:
    from megamask.optim.zero1 import Replicas
    from megamask.parallel.masked_linear import MaskedLinear

UPDATE_RULES: dict[str, UpdateRule] = {
    "adamw": AdamWRule(),
    "adamw8bit": AdamW8bitRule(),
    "lion": LionRule(),
    "lion8bit": Lion8bitRule(),
}

BETAS = "learn.optimizer.betas"
MEAN_DECAY = 0.9  # of the first moment
# AdamW's mean gradient spans this share of a run's steps at most, and these steps at least.
MEAN_SHARE, LEAST_MEAN = 1 / 6, 2.0

# The package that compiles the kernels of a device.
KERNELS = {"cpu": "numba", "cuda": "triton"}


def find_rule(name: str) -> UpdateRule:
    """The update rule ``learn.optimizer.kind = name``.

    Raises:
        ConfigError: there is no such rule.
    """
    if name not in UPDATE_RULES:
        near = difflib.get_close_matches(name, UPDATE_RULES, n=1)
        fix = f"Did you mean {near[0]}?" if near else "Choose one of them."
        raise ConfigError("learn.optimizer.kind", name, f"one of {', '.join(UPDATE_RULES)}", fix)
    return UPDATE_RULES[name]


def check_rule(config: Config) -> UpdateRule:
    """Check that the update rule exists, is installed, and can update such logits from such
    gradients; return it.

    Raises:
        ConfigError: an unknown rule, bf16 gradients of fp32 logits, an epsilon in units of a clip
            that is off, a missing package or compiler.
    """
    state, rule = config.learn.state, find_rule(config.learn.optimizer.kind)
    if state.grads == "bf16" and state.logits == "fp32":
        fix = "Use learn.state.logits=bf16 too, or learn.state.grads=fp32."
        raise ConfigError("learn.state.grads", "bf16", "fp32 while learn.state.logits=fp32", fix)
    absolute, relative = config.learn.optimizer.epsilon
    if rule.has_epsilon and relative > 0 and config.learn.optimizer.clip == 0:
        allowed = "[number, 0] with learn.optimizer.clip=0: the second part is in units of the clip"
        fix = (
            f"Write learn.optimizer.epsilon=[{absolute:g},0], or set learn.optimizer.clip above 0."
        )
        raise ConfigError("learn.optimizer.epsilon", [absolute, relative], allowed, fix)
    is_cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    rule.check("cuda" if is_cuda else "cpu")
    return rule


def build_optimizer(
    config: Config, linears: Sequence[MaskedLinear], replicas: Replicas | None = None
) -> MaskOptimizer:
    """The optimizer of the mask logits of ``linears``, or of the part of them that this replica
    updates.

    Args:
        config: all settings.
        linears: all masked linears of this rank.
        replicas: the division of their logits among replicas; None: each replica updates all.

    Raises:
        ConfigError: as ``check_rule``.
    """
    rule, learn = check_rule(config), config.learn
    logits = config.parallel.tp * sum(
        linear.mask_logits.numel() for linear in linears if linear.mask_logits is not None
    )
    mine = [linears[number] for number in replicas.mine] if replicas else linears
    optimizer = rule.build(
        section_for(config),
        mine,
        config.seed,
        use_kernels=_may_use_kernels(config, mine),
        logits_dtype=learn.state.logits,
        epsilon=epsilon(learn.optimizer, logits),
    )
    optimizer.is_sole_owner = replicas is not None
    return optimizer


def section_for(config: Config) -> OptimizerSection:
    """``learn.optimizer`` with the decay rates that follow from the run."""
    return config.learn.optimizer.model_copy(update={"betas": decay_rates(config)})


def decay_rates(config: Config) -> tuple[float, float]:
    """The decay rates of both moments, given or derived."""
    learn = config.learn
    return _decays(learn.optimizer.betas, learn.optimizer.kind, learn.steps)


def _decays(betas: Sequence[float] | None, kind: str, steps: int) -> tuple[float, float]:
    """The rates ``betas``, or those that follow from a run.

    A decay of d averages gradients over about 1 / (1 - d) steps. The usual 0.9 averages over ten:
    half of a run of 20 steps, whose first gradients are those of a much worse mask. So AdamW's mean
    spans a sixth of the run where that is less. Masks of 20 steps are 6 % better for it, and from
    60 steps on there was no difference (docs/log.md, "momentum that follows the steps").
    """
    if betas is not None:
        return betas[0], betas[1]
    rule = find_rule(kind)
    if not rule.has_short_means:
        return MEAN_DECAY, rule.second_decay
    span = max(LEAST_MEAN, steps * MEAN_SHARE)
    return min(MEAN_DECAY, 1 - 1 / span), rule.second_decay


def same_decays(before: Mapping[str, Any], config: Config) -> bool:
    """Whether the decay rates that dotted settings ``before`` stand for are those of ``config``:
    given before and derived now, as in runs of before the derivation, or the other way round.
    """
    given = before.get(BETAS)
    kind, steps = before.get("learn.optimizer.kind"), before.get("learn.steps")
    try:
        return _decays(given, str(kind), int(str(steps))) == decay_rates(config)
    except (ConfigError, ValueError, TypeError, IndexError):  # of a note that does not say it
        return False


def epsilon(section: OptimizerSection, logits: int) -> float:
    """The number that AdamW adds to the root of its second moment, for a model of ``logits`` mask
    logits.

    Without it all logits move by about the rate, whatever their gradients. Noise then flips as many
    groups as evidence does, although evidence is strongest where gradients are large. The relative
    part is in units of a clipped gradient: one of norm ``clip`` has the root mean square
    clip / sqrt(logits).
    """
    absolute, relative = section.epsilon
    return absolute + relative * section.clip / math.sqrt(logits)


def _may_use_kernels(config: Config, linears: Sequence[MaskedLinear]) -> bool:
    """Whether the kernels of the logits' device can update them."""
    packages = {KERNELS.get(linear.weight.device.type, "") for linear in linears}
    return config.learn.sampling.backend != "torch" and all(
        package and importlib.util.find_spec(package) for package in packages
    )
