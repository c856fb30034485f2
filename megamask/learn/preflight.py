"""What can be refused before a model is built: settings that cannot work, and inputs that do not
fit together.
"""

from __future__ import annotations

import difflib
import logging

from megamask import storage
from megamask.config import Config
from megamask.config.learn_tree import LearnSection, SamplingSection
from megamask.config.method_names import DISTRIBUTION_OF
from megamask.config.section import Section
from megamask.data.blend import blend_weights
from megamask.data.heldout import evaluated_domains
from megamask.errors import ConfigError
from megamask.learn.maskpro.score import choose_score
from megamask.optim.requirements import check_optimizer
from megamask.prepare.run_inputs import LearnInputs
from megamask.sparsity.distributions import DISTRIBUTIONS
from megamask.sparsity.pattern import Pattern

log = logging.getLogger(__name__)


def check_schedules(section: SamplingSection) -> None:
    """Check that sampling ends harder than it began.

    Raises:
        ConfigError: tau rises, kappa falls or ends at 0.
    """
    tau, kappa = section.tau, section.kappa
    if tau[1] > tau[0]:
        raise ConfigError(
            "learn.sampling.tau",
            list(tau),
            "a temperature that falls",
            "Write the larger one first.",
        )
    if kappa[1] < kappa[0]:
        raise ConfigError(
            "learn.sampling.kappa",
            list(kappa),
            "a scale that grows or stays",
            "Write the smaller one first.",
        )
    if kappa[1] == 0:
        raise ConfigError(
            "learn.sampling.kappa",
            list(kappa),
            "must end above 0: no logit counts at 0",
            "Write, for example, [100, 500].",
        )


def settings_without_effect(learn: LearnSection) -> set[str]:
    """Settings that change nothing whatever their value is: those of another method, and those of
    distillation where there is none.
    """
    if learn.method == "maskpro":
        unused = {
            f"learn.{name}.{key}"
            for name in ("optimizer", "distillation")
            for key in type(getattr(learn, name)).model_fields
        } | {"learn.weight_norm"}
        return unused - {"learn.distillation.share"}  # check_maskpro refuses it
    unused = {f"learn.maskpro.{key}" for key in type(learn.maskpro).model_fields}
    if learn.distillation.share == 0:
        unused |= {"learn.distillation.temperature", "learn.distillation.top_k"}
    return unused


def unused_settings(learn: LearnSection) -> list[str]:
    """The settings without effect that were given, by name of a preset or a memory too."""
    given = {f"learn.{name}" for name in learn.model_fields_set} | {
        f"learn.{name}.{key}"
        for name, section in learn
        if isinstance(section, Section)
        for key in section.model_fields_set
    }
    return sorted(given & settings_without_effect(learn))


def check_method(learn: LearnSection) -> None:
    """Check the name of the method.

    Raises:
        ConfigError: there is none of that name.
    """
    if learn.method not in DISTRIBUTION_OF:
        near = difflib.get_close_matches(learn.method, DISTRIBUTION_OF, n=1)
        fix = f"Did you mean {near[0]}?" if near else "Correct it, or leave it out."
        raise ConfigError("learn.method", learn.method, f"one of {', '.join(DISTRIBUTION_OF)}", fix)


def check_maskpro(config: Config) -> None:
    """Everything about this learner that can be refused before the model is loaded.

    Raises:
        ConfigError: settings that it cannot work with.
    """
    learn, section = config.learn, config.learn.maskpro
    if learn.state.logits != "fp32":
        fix = "Leave out learn.memory and learn.state: this learner keeps no gradients and no moments anyway."
        raise ConfigError(
            "learn.state.logits", learn.state.logits, "fp32 with learn.method=maskpro", fix
        )
    if learn.prior.mask is None or learn.sampling.initial_noise:
        key, value = (
            ("learn.prior.mask", None)
            if learn.prior.mask is None
            else ("learn.sampling.initial_noise", True)
        )
        raise ConfigError(
            key,
            value,
            "learn.method=maskpro starts from a prior mask and nothing else",
            PRIOR_FIX[key],
        )
    if learn.prior.strength == 0:
        fix = "Leave it out: this learner sets the logits of the prior's weights to learn.maskpro.initial_logit."
        raise ConfigError(
            "learn.prior.strength",
            0,
            "above 0 with learn.method=maskpro, or the prior would not show",
            fix,
        )
    if learn.distillation.share:
        raise ConfigError(
            "learn.distillation.share",
            learn.distillation.share,
            "0 with learn.method=maskpro, which learns from the text alone",
            "Set it to 0, or leave it out.",
        )
    choose_score(section.score, Pattern.parse(config.pattern))
    _check_masks(learn)


PRIOR_FIX = {
    "learn.prior.mask": "Name a one-shot method, a mask file or a snapshot, for example learn.prior.mask=sparsegpt.",
    "learn.sampling.initial_noise": "Set it to false, or leave it out.",
}


def _check_masks(learn: LearnSection) -> None:
    section, micro_batches = learn.maskpro, learn.global_batch // learn.micro_batch
    if section.baseline == "leave_one_out" and section.masks < 2:
        fix = "Set learn.maskpro.masks to 2 or more, or learn.maskpro.baseline to tracker or hard_mask."
        raise ConfigError(
            "learn.maskpro.masks",
            section.masks,
            "2 or more with learn.maskpro.baseline=leave_one_out",
            fix,
        )
    if section.data == "split" and micro_batches % section.masks:
        allowed = f"a divisor of the step's micro-batches, learn.global_batch / learn.micro_batch = {micro_batches}, with data=split"
        fix = "Change it or learn.global_batch, or show all masks the same samples with learn.maskpro.data=shared."
        raise ConfigError("learn.maskpro.masks", section.masks, allowed, fix)


def check_early(inputs: LearnInputs) -> None:
    """Everything that can be refused before the model is loaded: settings first, then files.

    Raises:
        MegamaskError: a setting, an input or an output folder that cannot work.
    """
    config = inputs.config
    inputs.layout.check_samples(config)
    check_method(config.learn)
    distribution = DISTRIBUTIONS[DISTRIBUTION_OF[config.learn.method]]
    distribution.logits_per_group(inputs.pattern)
    blend_weights(config)
    evaluated_domains(config)
    if config.learn.method == "maskpro":
        check_maskpro(config)
    else:
        check_optimizer(config)
        check_schedules(config.learn.sampling)
    storage.require_writable(inputs.paths.run_dir)
    inputs.check()
    if unused := unused_settings(config.learn):
        learn = config.learn
        choice = (
            f"learn.method={learn.method}, learn.distillation.share={learn.distillation.share:g}"
        )
        log.warning("without effect here (%s): %s", choice, ", ".join(unused))
