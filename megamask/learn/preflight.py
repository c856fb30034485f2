"""What can be refused before a model is built: schedules, and the pattern and prior against the
converted model.
"""

from __future__ import annotations

import logging

from megamask import storage
from megamask.config import Config, RunPaths, run_paths
from megamask.config.tree import LearnSection, SamplingSection, Section
from megamask.data.batches import check_batch
from megamask.data.blend import blend_weights
from megamask.errors import ConfigError
from megamask.learn.maskpro.score import choose_score
from megamask.learn.prior_mask import load_prior
from megamask.model.checkpoint import read_note
from megamask.optim.requirements import check_optimizer
from megamask.parallel.mesh import check_layout, world_size
from megamask.sparsity.distributions import logits_per_group
from megamask.sparsity.pattern import Pattern
from megamask.weights.architecture import Architecture, read_architecture
from megamask.weights.mapping import check_tp, prunable, rules

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
    """Settings that change nothing, whatever their value: of another loss, or of another
    learner.
    """
    if learn.learner == "maskpro":
        others = {
            f"learn.{name}.{key}"
            for name in ("optimizer", "weight_norm", "loss")
            for key in type(getattr(learn, name)).model_fields
        }
        return others - {"learn.loss.kind"}  # one that this learner cannot have is refused
    of_loss = {"lm": ("share", "temperature", "top_k"), "kd": ("share",), "mix": ()}[
        learn.loss.kind
    ]
    return {f"learn.loss.{key}" for key in of_loss} | {
        f"learn.maskpro.{key}" for key in type(learn.maskpro).model_fields
    }


def unused_settings(learn: LearnSection) -> list[str]:
    """The settings without effect that were given. Those of presets and footprints count too."""
    given = {
        f"learn.{name}.{key}"
        for name, section in learn
        if isinstance(section, Section)
        for key in section.model_fields_set
    }
    return sorted(given & settings_without_effect(learn))


def check_artefacts(config: Config) -> None:
    """Check pattern and prior against the converted model, whose weights are not read.

    Raises:
        MegamaskError: no weights, M does not divide a row of a rank, a prior that is missing, torn
            or made for something else.
    """
    weights = run_paths(config).weights
    fingerprint: str = read_note(weights)["fingerprint"]
    arch = read_architecture(weights)
    check_tp(arch, config.parallel.tp)
    check_rows(config, arch)
    load_prior(config, arch, fingerprint)


def check_rows(config: Config, arch: Architecture) -> None:
    """Check that M divides every row that is pruned, as it lies on a rank.

    Raises:
        ConfigError: naming the linear.
    """
    pattern, tp = Pattern.parse(config.pattern), config.parallel.tp
    chosen = set(prunable(arch, config.model.include, config.model.exclude))
    for rule in rules(arch):
        if rule.is_linear and chosen.intersection(rule.modules):
            name = rule.megatron.removesuffix(".weight")
            pattern.groups(
                rule.shape(tp)[-1], f"in_features of {name}", tp if rule.kind == "row" else 1
            )


def check_maskpro(config: Config) -> None:
    """Everything about this learner that can be refused before the model is loaded.

    Raises:
        ConfigError: settings that it cannot work with.
    """
    learn, section = config.learn, config.learn.maskpro
    if learn.distribution != "linear":
        fix = "Set learn.distribution=linear, or leave it out."
        raise ConfigError(
            "learn.distribution",
            learn.distribution,
            "linear, one logit per weight, with learn.learner=maskpro",
            fix,
        )
    if learn.state.logits != "fp32":
        fix = "Leave out learn.footprint and learn.state: this learner keeps no gradients and no moments anyway."
        raise ConfigError(
            "learn.state.logits", learn.state.logits, "fp32 with learn.learner=maskpro", fix
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
            "learn.learner=maskpro starts from a prior mask and nothing else",
            PRIOR_FIX[key],
        )
    if learn.prior.strength == 0:
        fix = "Leave it out: this learner sets the logits of the prior's weights to learn.maskpro.initial_logit."
        raise ConfigError(
            "learn.prior.strength",
            0,
            "above 0 with learn.learner=maskpro, or the prior would not show",
            fix,
        )
    if learn.loss.kind != "lm":
        raise ConfigError(
            "learn.loss.kind",
            learn.loss.kind,
            "lm with learn.learner=maskpro",
            "Set it to lm, or leave it out.",
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
        fix = (
            "Set learn.maskpro.masks to 2 or more, or learn.maskpro.baseline to tracker or winner."
        )
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


def check_early(config: Config, paths: RunPaths) -> None:
    """Everything that can be refused before the model is loaded.

    Raises:
        MegamaskError: a setting or an output folder that cannot work.
    """
    check_layout(config)
    check_batch(
        config.learn.global_batch, config.learn.micro_batch, world_size() // config.parallel.tp
    )
    logits_per_group(Pattern.parse(config.pattern), config.learn.distribution)
    blend_weights(config)
    if config.learn.learner == "maskpro":
        check_maskpro(config)
    else:
        check_optimizer(config)
        check_schedules(config.learn.sampling)
    storage.require_writable(paths.run_dir)
    check_artefacts(config)
    if unused := unused_settings(config.learn):
        choice = f"learn.learner={config.learn.learner}, learn.loss.kind={config.learn.loss.kind}"
        log.warning("without effect here (%s): %s", choice, ", ".join(unused))
