"""The parts that the share ``model.exclude_sensitive`` comes to: the most sensitive by the file of
the verb ``sensitivity``, which must be of this very model, pattern and text.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megamask import storage
from megamask.config import Config, run_paths
from megamask.errors import ArtifactError, ConfigError
from megamask.evaluate.measured_text import measured_text
from megamask.evaluate.sensitivity import kept_dense
from megamask.prepare.run_inputs import RunInputs
from megamask.sparsity.pattern_plan import PatternPlan
from megamask.weights.architecture import Architecture
from megamask.weights.layer_plan import SENSITIVE, layer_plan
from megamask.weights.model_identity import OTHER_PARTS, is_model_of, model_facts_of

log = logging.getLogger(__name__)
FILE = "sensitivity.json"
FIX = (
    "Run megamask prune and megamask sensitivity with model.exclude_sensitive=0 and the same "
    "settings, or name its file: model.sensitivity."
)
MADE_FROM = {
    "fingerprint": str,
    "pattern": (str, dict),
    "linears": list,
    "parts": list,
    "protocol": dict,
}
TEXT = ("name", "window", "bos", "tokenizer_sha256", "text_sha256")  # of a protocol: what was read


def with_dense_budget(config: Config, planned: Architecture | None = None) -> Config:
    """The settings with the list of parts that the share comes to; those of a run without a share
    as they are. The list lies in the settings from then on, so a run can be repeated by its
    config.yaml without the file.

    Args:
        config: the settings.
        planned: the model of a plan, for which there may be no weights and no text: the fingerprint
            is compared where the run has converted weights, and the text is not compared.

    Raises:
        ArtifactError: the file is missing, torn, not finished, or of another model, pattern or
            text.
        ConfigError: the share keeps nothing dense, or as ``layer_plan``.
    """
    share, inputs = config.model.exclude_sensitive, RunInputs(config)
    if isinstance(share, list) or not share:
        return config
    path = Path(config.model.sensitivity or inputs.paths.run_dir / FILE)
    found = storage.read_object(path, FIX, {"made_from": MADE_FROM, "dense": dict, "loss": dict})
    made_from, losses = found["made_from"], found["loss"]
    if list(losses) != made_from["parts"]:
        problem = f"is not finished: it has {len(losses)} of {len(made_from['parts'])} parts"
        raise ArtifactError(path, problem, "Run megamask sensitivity again: it goes on.")
    if planned is None or inputs.paths.weights.exists():
        _check_model(path, made_from, inputs)
    arch = inputs.arch if planned is None else planned
    plan = layer_plan(arch, _with(config, []))
    _check_plan(path, made_from["pattern"], made_from["linears"], plan)
    if planned is None:
        _check_text(path, made_from["protocol"], measured_text(inputs).facts)
    try:
        parts = kept_dense(found["dense"], losses, share)
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise ArtifactError(path, f"holds no losses by domain ({error!r})", FIX) from None
    if not parts:
        allowed = f"a share that keeps a part dense: of {len(losses)} parts it rounds to none"
        raise ConfigError(SENSITIVE, share, allowed, "Raise it, or set it to 0.")
    log.info("kept dense (%s=%g): %s", SENSITIVE, share, ", ".join(parts))
    chosen = _with(config, parts)
    layer_plan(arch, chosen)
    return chosen


def refuse_to_replace(config: Config, made_from: Mapping[str, Any]) -> None:
    """Refuse to measure a mask that lacks linears of which the file in the run folder tells the
    sensitivity: the mask may have been made under a budget that stands on this file. The linears
    are compared and not the parts, whose names also depend on ``sensitivity.by``.

    Raises:
        ArtifactError: the file is finished, of this model, and has linears that the mask lacks.
    """
    path = run_paths(config).run_dir / FILE
    try:
        found = storage.read_object(path, "", {"made_from": MADE_FROM, "loss": dict})
    except ArtifactError:
        return
    before = found["made_from"]
    is_finished = before["parts"] == list(found["loss"])
    lost = sorted({*map(str, before["linears"])} - {*made_from["linears"]})
    if is_finished and lost and before["fingerprint"] == made_from["fingerprint"]:
        problem = (
            f"measured {len(before['linears'])} linears, of which the mask lacks {len(lost)}, such "
            f"as {lost[0]}"
        )
        fix = "Name a mask of all linears (sensitivity.mask), another run_dir, or delete the file."
        raise ArtifactError(path, problem, fix)


def _with(config: Config, parts: list[str]) -> Config:
    model = config.model.model_copy(update={"exclude_sensitive": parts})
    return config.model_copy(update={"model": model})


def _check_model(path: Path, made_from: Mapping[str, Any], inputs: RunInputs) -> None:
    measured, fingerprint = made_from["fingerprint"], inputs.fingerprint
    if measured != fingerprint:
        problem = f"was measured on another model ({measured[:12]}; this is {fingerprint[:12]})"
        raise ArtifactError(path, problem, FIX)
    if not is_model_of(made_from, model_facts_of(inputs.note)):
        raise ArtifactError(path, f"was measured on another model: {OTHER_PARTS}", FIX)


def _check_plan(
    path: Path, measured: str | Mapping[str, str], linears: Collection[str], plan: PatternPlan
) -> None:
    """Check that the masks that were measured had the patterns of the run, and that every linear
    that would be pruned was measured. The name of a part is a pattern that may also match linears
    without a mask, so the linears themselves decide.
    """
    for name, pattern in plan.items():
        if name not in linears:
            raise ArtifactError(path, f"did not measure {name}, which would be pruned", FIX)
        before = measured if isinstance(measured, str) else measured.get(name)
        if before != str(pattern):
            problem = f"was measured with {before} for {name}, which would be {pattern}"
            raise ArtifactError(path, problem, FIX)


def _check_text(path: Path, measured: Mapping[str, Any], now: Mapping[str, object]) -> None:
    here = storage.as_read(now)
    for key in TEXT:
        if measured.get(key) != here.get(key):
            values = f"{key} {measured.get(key)!r}, not {here.get(key)!r}"
            problem = f"was measured on other text: {values}"
            raise ArtifactError(path, problem, FIX)
