"""What can be refused before a model is built: schedules, and the pattern and prior against the converted model."""

from __future__ import annotations

from megamask.config import Config, run_paths
from megamask.config.tree import LearnSection, SamplingSection, Section
from megamask.errors import ConfigError
from megamask.learn.prior import load_prior
from megamask.model.checkpoint import read_note
from megamask.sparsity.pattern import Pattern
from megamask.weights.architecture import Architecture, read_architecture
from megamask.weights.table import check_tp, prunable, rules


def check_schedules(section: SamplingSection) -> None:
    """Check that sampling ends harder than it began.

    Raises:
        ConfigError: tau rises, kappa falls or ends at 0.
    """
    tau, kappa = section.tau, section.kappa
    if tau[1] > tau[0]:
        raise ConfigError("learn.sampling.tau", list(tau), "a temperature that falls", "Write the larger one first.")
    if kappa[1] < kappa[0]:
        raise ConfigError("learn.sampling.kappa", list(kappa), "a scale that grows or stays", "Write the smaller one first.")
    if kappa[1] == 0:
        raise ConfigError("learn.sampling.kappa", list(kappa), "must end above 0: no logit counts at 0", "Write, for example, [100, 500].")


def settings_without_effect(learn: LearnSection) -> set[str]:
    """Settings that change nothing, whatever their value: of another loss, or of another learner."""
    if learn.learner == "maskpro":
        others = {f"learn.{name}.{key}" for name in ("optimizer", "weight_norm", "loss") for key in type(getattr(learn, name)).model_fields}
        return others - {"learn.loss.kind"}  # one that this learner cannot have is refused
    of_loss = {"lm": ("share", "temperature", "top_k"), "kd": ("share",), "mix": ()}[learn.loss.kind]
    return {f"learn.loss.{key}" for key in of_loss} | {f"learn.maskpro.{key}" for key in type(learn.maskpro).model_fields}


def unused_settings(learn: LearnSection) -> list[str]:
    """The settings without effect that were given. Those of presets and footprints count too."""
    given = {f"learn.{name}.{key}" for name, section in learn if isinstance(section, Section) for key in section.model_fields_set}
    return sorted(given & settings_without_effect(learn))


def check_subject(config: Config) -> None:
    """Check pattern and prior against the converted model, whose weights are not read.

    Raises:
        MegamaskError: no weights, M does not divide a row of a rank, a prior that is missing, torn or made for something else.
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
            pattern.groups(rule.shape(tp)[-1], f"in_features of {name}", tp if rule.kind == "row" else 1)
