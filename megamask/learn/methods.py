"""The registry of methods of learning. A new method is one file and one line here."""

from __future__ import annotations

import difflib

from megamask.errors import ConfigError
from megamask.learn.gradient_method import GradientMethod
from megamask.learn.maskpro.policy_method import PolicyMethod
from megamask.learn.method import PARTS, Method, StateOf
from megamask.sparsity.categorical.categorical import CATEGORICAL
from megamask.sparsity.subset.subset import SUBSET

METHODS: dict[str, Method] = {
    "subset": GradientMethod(SUBSET),
    "categorical": GradientMethod(CATEGORICAL),
    "maskpro": PolicyMethod(),
}


def find_method(name: str) -> Method:
    """The method ``learn.method = name``.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        fix = f"Did you mean {near[0]}?" if near else "Correct it, or leave it out."
        raise ConfigError("learn.method", name, f"one of {', '.join(METHODS)}", fix)
    return METHODS[name]


def state_bytes(run: StateOf) -> dict[str, float]:
    """Bytes per prunable weight of the state of a run, by part (``PARTS``, in this order; 0 where
    the method of the run has no such part).

    Raises:
        ConfigError: an unknown method or update rule, or a pattern too large for the distribution.
    """
    parts = find_method(run.learn.method).state_bytes(run)
    return {part: parts.get(part, 0.0) for part in PARTS}
