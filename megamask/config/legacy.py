"""Words that the settings had before. Recipes, overrides and the notes of snapshots may still use
them; each is read as the setting that it is called now, and said once in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

from megamask.config.nested import flatten, merge, nest
from megamask.config.tree import Config
from megamask.errors import ConfigError

log = logging.getLogger(__name__)

# Settings that changed their name alone.
RENAMED = {
    "learn.footprint": "learn.memory",
    "learn.state.movement": "learn.state.track_flips",
    "learn.loss.temperature": "learn.distillation.temperature",
    "learn.loss.top_k": "learn.distillation.top_k",
}
# Settings that are arguments of a verb now.
ARGUMENTS = {
    "plan": {"model": "--model", "dp": "--dp", "gpu": "--gpu", "out": "--json"},
    "diff": {"a": "A", "b": "B", "out": "--json", "picture": "--picture"},
    "extract": {"mask": "SNAPSHOT", "out": "FILE"},
}
DISTRIBUTIONS = {"linear": "subset", "categorical": "categorical"}
# What was done before there was a setting, where that is not the default of the setting. The second
# table is of notes that have no learn.method yet.
NEWER: dict[str, Any] = {"learn.prior.margins": False, "learn.sampling.noise": 1.0}
BEFORE_SETTING = {"learn.distribution": "categorical", "learn.optimizer.eps_rms": 0.0}


def upgrade(
    values: dict[str, Any], below: Mapping[str, Any] | None = None, say: bool = True
) -> dict[str, Any]:
    """Replace the old words in nested ``values``, in place, and return them.

    Args:
        values: a recipe, overrides or the settings of a snapshot's note, as nested mappings.
        below: nested new-style values that ``values`` will lie above. Where an old word stands for
            a part of a setting, the rest of it comes from there, or else from the default.
        say: whether to log the new words.

    Raises:
        ConfigError: old words that contradict each other, or an old word with a wrong value.
    """
    old = _Old(values, below or {}, say)
    for before, now in RENAMED.items():
        if old.has(before):
            old.set(now, old.pop(before), before)
    for now, translate in TRANSLATED.items():
        try:
            translate(old)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            allowed = "a value that fits the old words beside it"
            fix = "Write new words alone: megamask settings lists them."
            raise ConfigError(now, old.current(now), allowed, fix) from None
    old.drop_empty("learn.loss")
    return values


def upgrade_note(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flattened settings of a snapshot's note, whichever words it was written with.

    Args:
        settings: as the note holds them: flattened, or nested as before.

    Raises:
        TypeError: the note holds something else than settings.
    """
    flat = flatten(settings)
    try:
        nested = nest(flat)
        learn = nested.get("learn", {})
        for key, value in NEWER.items():
            merge(nested, nest({key: flat.get(key, value)}))
        if "method" not in learn:
            for key, value in BEFORE_SETTING.items():
                merge(nested, nest({key: flat.get(key, value)}))
        found = flatten(upgrade(nested, say=False))
        if found.get("learn.optimizer.clip") == 0 and "learn.optimizer.epsilon" in found:
            # The relative part is in units of the clip: such a run learned without it.
            found["learn.optimizer.epsilon"] = [found["learn.optimizer.epsilon"][0], 0.0]
    except (AttributeError, IndexError, ConfigError) as error:
        raise TypeError(f"the settings are no settings ({error})") from None
    return found


def take_arguments(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Take the sections that became arguments of verbs out of ``values``; verb -> argument ->
    value.

    Raises:
        ConfigError: such a section holds something else than the arguments.
    """
    taken: dict[str, dict[str, Any]] = {}
    for verb, names in ARGUMENTS.items():
        section = values.pop(verb, None)
        for key, value in (section if isinstance(section, dict) else {}).items():
            if key not in names:
                allowed = f"an argument of megamask {verb}: {', '.join(names.values())}"
                raise ConfigError(f"{verb}.{key}", value, allowed, f"See megamask {verb} --help.")
            log.warning("%s.%s is %s of megamask %s now", verb, key, names[key], verb)
            taken.setdefault(verb, {})[names[key].removeprefix("--").lower()] = value
    return taken


class _Old:
    """Nested values whose old words are taken out one by one."""

    def __init__(self, values: dict[str, Any], below: Mapping[str, Any], say: bool) -> None:
        self.values, self.below, self.say = values, below, say

    def has(self, key: str) -> bool:
        return _find(self.values, key) is not None

    def pop(self, key: str, default: Any = None) -> Any:
        place = _find(self.values, key)
        return default if place is None else place.pop(key.rpartition(".")[2])

    def current(self, key: str) -> Any:
        """The new setting as it is without the old word."""
        for tree in (self.values, self.below):
            if (place := _find(tree, key)) is not None:
                return place[key.rpartition(".")[2]]
        return reduce(getattr, key.split("."), Config())

    def set(self, now: str, value: Any, *befores: str) -> None:
        """Give the new setting its value, unless ``values`` have it in the new words."""
        if self.say:
            for before in befores:
                log.warning("%s is %s now", before, now)
        if not self.has(now):
            merge(self.values, nest({now: value}))

    def drop_empty(self, key: str) -> None:
        place = _find(self.values, key)
        if place is not None and place[key.rpartition(".")[2]] == {}:
            self.pop(key)


def _find(tree: Mapping[str, Any], key: str) -> Any:
    """The mapping that holds the last part of a dotted key; None where there is none."""
    *sections, name = key.split(".")
    place: Any = tree
    for section in sections:
        place = place.get(section) if isinstance(place, Mapping) else None
    return place if isinstance(place, Mapping) and name in place else None


def _choose(key: str, value: Any, allowed: tuple[Any, ...], now: str) -> Any:
    if not any(value is one or (value == one and type(value) is type(one)) for one in allowed):
        names = ", ".join(str(one).lower() for one in allowed if one is not None)
        raise ConfigError(key, value, f"one of {names}", f"It is {now} now.")
    return value


def _given(old: _Old, *keys: str) -> list[str]:
    return [key for key in keys if old.has(key)]


def _method(old: _Old) -> None:
    given = _given(old, "learn.learner", "learn.distribution")
    if not given:
        return
    learner, distribution = old.pop("learn.learner"), old.pop("learn.distribution")
    now = "learn.method"
    _choose("learn.learner", learner, ("gumbel", "maskpro", None), now)
    _choose("learn.distribution", distribution, (*DISTRIBUTIONS, None), now)
    current = old.current(now)
    policy = learner == "maskpro" or (learner is None and current == "maskpro")
    if policy and distribution == "categorical":
        allowed = "linear, one logit per weight, with learn.learner=maskpro"
        raise ConfigError(given[-1], distribution, allowed, "Set learn.method alone.")
    if policy:
        method = "maskpro"
    elif distribution is not None:
        method = DISTRIBUTIONS[distribution]
    else:
        method = "subset" if current == "maskpro" else current
    old.set(now, method, *given)


def _distillation(old: _Old) -> None:
    given = _given(old, "learn.loss.kind", "learn.loss.share")
    if not given:
        return
    now, current = "learn.distillation.share", old.current("learn.distillation.share")
    kind, share = old.pop("learn.loss.kind"), old.pop("learn.loss.share")
    _choose("learn.loss.kind", kind, ("lm", "kd", "mix", None), now)
    if kind == "mix" or (kind is None and 0 < current < 1):
        found = (current if 0 < current < 1 else 0.5) if share is None else share
    else:
        found = {"lm": 0.0, "kd": 1.0, None: current}[kind]
    old.set(now, found, *given)


def _weight_norm(old: _Old) -> None:
    keys = ("learn.weight_norm.coef", "learn.weight_norm.decay")
    given = _given(old, *keys)
    if not given:
        return
    coef, decay = (old.pop(key) for key in keys)
    old.drop_empty("learn.weight_norm")
    first, last = old.current("learn.weight_norm")
    _choose(keys[1], decay, ("none", "linear", None), "learn.weight_norm")
    first = first if coef is None else coef
    falls = last == 0 if decay is None else decay == "linear"
    old.set("learn.weight_norm", [first, 0.0 if falls else first], *given)


def _epsilon(old: _Old) -> None:
    keys = ("learn.optimizer.eps", "learn.optimizer.eps_rms")
    given = _given(old, *keys)
    if not given:
        return
    now = "learn.optimizer.epsilon"
    pairs = zip((old.pop(key) for key in keys), old.current(now), strict=True)
    old.set(now, [rest if value is None else value for value, rest in pairs], *given)


def _sinks(old: _Old) -> None:
    if old.has("learn.monitor.patience"):
        patience = old.pop("learn.monitor.patience")
        if old.say:
            log.warning(
                "learn.monitor.patience=%s has no effect: a run learns all its steps", patience
            )
    given = _given(old, "learn.monitor.tensorboard", "learn.monitor.wandb")
    if not given:
        return
    now = "learn.monitor.sinks"
    board, wandb = old.pop("learn.monitor.tensorboard"), old.pop("learn.monitor.wandb")
    _choose("learn.monitor.tensorboard", board, (True, False, None), now)
    _choose("learn.monitor.wandb", wandb, ("off", "offline", "online", None), now)
    sinks = list(old.current(now))
    if board is not None:
        sinks = ["tensorboard"] * board + [one for one in sinks if one != "tensorboard"]
    if wandb is not None:
        name = {"off": [], "offline": ["wandb_offline"], "online": ["wandb"]}[wandb]
        sinks = [one for one in sinks if not one.startswith("wandb")] + name
    old.set(now, sinks, *given)


def _eod(old: _Old) -> None:
    given = _given(old, "data.append_eod", "data.eod_token")
    if not given:
        return
    appends, named = old.pop("data.append_eod"), old.has("data.eod_token")
    token, current = old.pop("data.eod_token"), old.current("data.eod")
    _choose("data.append_eod", appends, (True, False, None), "data.eod")
    eod = ("auto" if token is None else token) if named else current
    if appends is False:
        eod = None
    elif appends and eod is None:
        eod = "auto"
    old.set("data.eod", eod, *given)


def _baseline(old: _Old) -> None:
    key = "learn.maskpro.baseline"
    if old.has(key) and old.current(key) == "winner":
        old.pop(key)
        old.set(key, "hard_mask")
        if old.say:
            log.warning("%s=winner is %s=hard_mask now", key, key)


# new word -> the function that makes it of old words
TRANSLATED: dict[str, Callable[[_Old], None]] = {
    "learn.method": _method,
    "learn.distillation.share": _distillation,
    "learn.weight_norm": _weight_norm,
    "learn.optimizer.epsilon": _epsilon,
    "learn.monitor.sinks": _sinks,
    "data.eod": _eod,
    "learn.maskpro.baseline": _baseline,
}
