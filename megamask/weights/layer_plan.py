"""The one rule of which linear gets a mask of which pattern: ``model.include``,
``model.exclude`` and ``model.exclude_sensitive`` say which linears stay dense, ``pattern`` and
``pattern_overrides`` which pattern the others have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from megamask.config import Config
from megamask.errors import ConfigError
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.pattern_plan import PatternPlan
from megamask.weights.family import Architecture
from megamask.weights.mapping import linear_shapes, prunable, require_match, rules

OVERRIDES, SENSITIVE = "pattern_overrides", "model.exclude_sensitive"


def asked_patterns(config: Config) -> list[Pattern]:
    """The patterns of the settings, each once, whichever linears they are for.

    Raises:
        ConfigError: a text is no pattern.
    """
    overrides = (_parsed(key, text) for key, text in config.pattern_overrides.items())
    return list(dict.fromkeys([Pattern.parse(config.pattern), *overrides]))


def layer_plan(arch: Architecture, config: Config) -> PatternPlan:
    """The linears that a run prunes, in model order, and their patterns.

    Raises:
        ConfigError: the settings of dense linears do not fit the model (``mapping.prunable``), or
            those of the patterns (``patterns_of``); an entry of ``pattern_overrides`` is for dense
            linears alone; or ``model.exclude_sensitive`` is a share, which the verbs look up before
            (``evaluate.dense_budget``).
    """
    model = config.model
    sensitive = model.exclude_sensitive
    if not isinstance(sensitive, list):
        if sensitive:
            allowed = "a list of linears here, where no share is looked up"
            fix = "Give the list that megamask sensitivity prints, or set it to 0."
            raise ConfigError(SENSITIVE, sensitive, allowed, fix)
        sensitive = []
    modules = prunable(arch, model.include, model.exclude, sensitive)
    plan = patterns_of(arch, config.pattern, config.pattern_overrides, modules)
    for key, text in config.pattern_overrides.items():
        if not any(fnmatchcase(name, key) for name in modules):
            allowed = "linears of which at least one is pruned: all that match it are kept dense"
            fix = f"Remove the entry, or change model.include, model.exclude or {SENSITIVE}."
            raise ConfigError(f"{OVERRIDES}.{key}", text, allowed, fix)
    return plan


def patterns_of(
    arch: Architecture, pattern: str, overrides: Mapping[str, str], modules: Iterable[str]
) -> PatternPlan:
    """The patterns of linears that are known to get a mask.

    Args:
        arch: the model.
        pattern: the setting ``pattern``.
        overrides: the setting ``pattern_overrides``.
        modules: HF names of the linears.

    Raises:
        ConfigError: a text is no pattern, an entry matches no linear of the model, two entries
            match one linear, or linears that Megatron fuses would have several patterns.
    """
    default, names = Pattern.parse(pattern), list(linear_shapes(arch))
    own: dict[str, Pattern] = {}
    entry_of: dict[str, str] = {}
    for key, text in overrides.items():
        parsed = _parsed(key, text)
        require_match(OVERRIDES, key, names)
        for name in (one for one in names if fnmatchcase(one, key)):
            if name in entry_of:
                allowed = f"patterns for different linears: {name} also matches {entry_of[name]}"
                fix = "Narrow one of the two entries."
                raise ConfigError(f"{OVERRIDES}.{key}", text, allowed, fix)
            own[name], entry_of[name] = parsed, key
    for rule in rules(arch) if own else ():
        found = {str(own.get(name, default)): name for name in rule.modules}
        if rule.is_linear and len(found) > 1:
            said = ", ".join(f"{name} {one}" for one, name in found.items())
            allowed = f"one pattern for {', '.join(rule.modules)}, which Megatron fuses: {said}"
            fix = "Let one entry match all of them, or none."
            raise ConfigError(OVERRIDES, dict(overrides), allowed, fix)
    return PatternPlan({name: own.get(name, default) for name in modules})


def _parsed(key: str, text: str) -> Pattern:
    """The pattern of an entry of ``pattern_overrides``. Raises ConfigError as ``Pattern.parse``."""
    try:
        return Pattern.parse(text)
    except ConfigError as error:
        fix = f'Write, for example, {OVERRIDES}: {{"*.down_proj": "6:8"}}.'
        raise ConfigError(f"{OVERRIDES}.{key}", error.value, error.allowed, fix) from None
