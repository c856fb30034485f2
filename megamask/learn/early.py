"""What can be refused before a model is built: schedules, and the pattern and prior against the converted model."""

from __future__ import annotations

from megamask.config import Config, run_paths
from megamask.config.tree import SamplingSection
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


def unused_settings(config: Config) -> list[str]:
    """Settings that were given and change nothing: of another loss, or of another learner. Those of presets and footprints count too."""
    learn = config.learn
    if learn.learner == "maskpro":
        sections = {"optimizer": learn.optimizer, "weight_norm": learn.weight_norm, "loss": learn.loss}
        return [f"learn.{name}.{key}" for name, section in sections.items() for key in sorted(section.model_fields_set - {"kind"})]
    of_loss = {"lm": {"share", "temperature", "top_k"}, "kd": {"share"}, "mix": set()}[learn.loss.kind]
    given = [f"learn.loss.{key}" for key in sorted(learn.loss.model_fields_set & of_loss)]
    return given + [f"learn.maskpro.{key}" for key in sorted(learn.maskpro.model_fields_set)]


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
