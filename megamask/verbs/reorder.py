"""The verb reorder: a dense Hugging Face folder whose channels stand in an order in which N:M masks
lose less. Its function is that of the model, to rounding.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megamask import __version__, storage
from megamask.config import Config
from megamask.data.heldout import calibration_description, calibration_tokens
from megamask.data.shards import check_vocabulary
from megamask.data.shared_text import check_shards
from megamask.errors import ArtifactError, ConfigError, MegamaskError
from megamask.model.build import build_model, prunable_linears
from megamask.model.checkpoint import fill_from_hf
from megamask.oneshot.channel_search import (
    Found,
    find_orders,
    input_moments,
    kind_of,
    readers,
    stream_patterns,
)
from megamask.oneshot.value_rotation import find_rotations
from megamask.parallel.determinism import deterministic
from megamask.parallel.mesh import start
from megamask.prepare.dense_model import pruned_already
from megamask.prepare.layout import Layout, check_positions
from megamask.sparsity.pattern_plan import PatternPlan
from megamask.terminal import tell
from megamask.verbs.own_arguments import ReorderArguments
from megamask.weights.architecture import Architecture
from megamask.weights.base_model import BaseModel, base_model
from megamask.weights.channel_orders import reordered_streamed
from megamask.weights.file_layout import file_layout
from megamask.weights.hf_files import write_hf
from megamask.weights.layer_plan import asked_patterns, layer_plan
from megamask.weights.model_identity import identity_note, model_facts_of, recipe_differs
from megamask.weights.own_folder import check_output, own_files
from megamask.weights.side_files import side_digests
from megamask.weights.source import WeightSource

log = logging.getLogger(__name__)
STAMP = "megamask_reorder.json"  # this file in the written folder says what it was made from
SIDE_FILES, WRITTEN = "side_files", "fingerprint"  # keys of the stamp; older stamps have neither


def run(config: Config, arguments: ReorderArguments) -> None:
    """Write the model in its new order as the folder ``arguments.out``, unless the folder was made
    from the same model, text and settings.

    Raises:
        ConfigError: the folder is the model's, no kind of channels can be reordered, or a setting
            does not fit the model.
        ArtifactError: model or shards are missing or torn, the model is pruned already, or the
            folder holds other files or cannot be written.
    """
    out, ignore_keys = Path(arguments.out), config.model.ignore_keys
    for pattern in asked_patterns(config):
        if pattern.unit > 1:
            allowed = "N:M of single weights: there is no search of an order for pairs"
            fix = f"Set pattern={pattern.n}:{pattern.m}, or go on without a new order."
            raise ConfigError("pattern", str(pattern), allowed, fix)
    base = base_model(config)
    check_output(out, STAMP, "OUT", base)
    Layout.launched(config).check_lengths(config, ("calibration.seq_length",))
    arch = base.architecture()
    layout = file_layout(arch)
    if arch.experts is not None or layout.others:
        parts = "experts" if arch.experts is not None else "other parts than text"
        allowed = f"a model without {parts} ({arch.family} has them): their orders are not built"
        raise ConfigError(
            "model.hf", str(base.hf_dir), allowed, "Use the model in its present order."
        )
    Layout.launched(config).check_model(arch)
    plan = layer_plan(arch, config)
    _check_patterns(arch, plan, arguments.rotate_values)
    check_positions(config, arch, ("calibration.seq_length",))
    check_vocabulary(config, arch.vocab)
    check_shards(config)
    with base.open() as reader, start(config) as mesh:
        identity = identity_note(base, reader)
        made_from = {
            "fingerprint": identity["fingerprint"],
            **model_facts_of(identity),
            "pattern": plan.facts(),
            "linears": [*plan],
            "dtype": config.dtype,
            "calibration": calibration_description(config),
        }
        if arguments.rotate_values:
            made_from["rotated"] = "values"
        mesh.require_same("inputs", made_from)
        made_from[SIDE_FILES] = base.side_digests()  # the main rank copies them
        if mesh.from_main(mesh.is_main and _is_done(out, made_from, ignore_keys)):
            if mesh.is_main:
                log.info("%s already holds this model in its new order", out)
            return
        begin = time.perf_counter()
        model = build_model(config, arch, mesh).eval()
        fill_from_hf(model, arch, mesh, reader)
        linears = prunable_linears(model, config, arch)
        if sparse := pruned_already(linears, arch, plan, mesh):
            problem = f"holds a model that is pruned already: {sparse}"
            fix = "Reorder the dense model: another order would break the groups of its mask."
            raise ArtifactError(base.place, problem, fix)
        moments = input_moments(
            model,
            linears,
            calibration_tokens(config),
            config.calibration.micro_batch,
            mesh,
            config.parallel.sequence_parallel,
            arch.head_dim if arguments.rotate_values else None,
        )
        del model, linears  # the searches and the tensors of the files need the memory
        if not mesh.is_main:
            return
        device = mesh.device
    # No rank waits, for the limit of parallel.timeout_minutes does not know how long this takes.
    with base.open() as reader, deterministic(config.deterministic, device):
        found = find_orders(reader, arch, plan, moments.mean_square, device)
        if arguments.rotate_values:
            find_rotations(reader, arch, plan, moments, found, device)
        _write(base, arch, out, reader, found, made_from, str(plan))
        log.info("wrote %s, %.1f s", out, time.perf_counter() - begin)


def _check_patterns(arch: Architecture, plan: PatternPlan, rotates: bool) -> None:
    """Check that some channels that the linears to prune read split into groups, and that linears
    which share an order of channels have one pattern.
    """
    if len(stream_patterns(arch, plan)) > 1 or (rotates and plan.only is None):
        who = (
            "all linears (--rotate-values)" if rotates else "linears that read the residual stream"
        )
        allowed, fix = (
            f"one pattern for {who}",
            "Narrow pattern_overrides, or do without a new order.",
        )
        raise ConfigError("pattern_overrides", str(plan), allowed, fix)
    widths = {"hidden": arch.hidden, "ffn": arch.ffn, "value": arch.head_dim}
    names = {"hidden": "hidden_size", "ffn": "intermediate_size", "value": "head_dim"}
    chosen = readers(arch, plan)
    if rotates and not any(
        kind_of(rule) == "value" and arch.head_dim % plan[rule.modules[0]].m == 0 for rule in chosen
    ):
        allowed = (
            "an output projection to prune (model.include, model.exclude) and a pattern whose M "
            f"divides head_dim = {arch.head_dim}"
        )
        fix = "Leave --rotate-values out: there is nothing to rotate for."
        raise ConfigError("--rotate-values", str(plan), allowed, fix)
    kinds = {kind_of(rule) for rule in chosen}
    if all(widths[kind_of(rule)] % plan[rule.modules[0]].m for rule in chosen):
        listed = ", ".join(f"{names[kind]} = {widths[kind]}" for kind in names if kind in kinds)
        allowed = f"M must divide a number of channels that the linears to prune read: {listed}"
        fix = "Choose another pattern, or other linears (model.include, model.exclude)."
        raise ConfigError("pattern", str(plan), allowed, fix)


def _is_done(out: Path, made_from: Mapping[str, Any], ignore_keys: Collection[str]) -> bool:
    """Whether the folder is there, as it was written, and was made from the same inputs."""
    try:
        stamp = storage.read_object(out / STAMP, "", {"made_from": dict, "files": list})
        whole = all((out / str(name)).is_file() for name in stamp["files"])
        found, wanted = stamp["made_from"], dict(made_from)
        if SIDE_FILES not in found:
            wanted.pop(SIDE_FILES, None)
        written = BaseModel(out, ignore_keys=ignore_keys).fingerprints().exact
        is_as_written = stamp.get(WRITTEN, written) == written
        is_as_written &= stamp.get(SIDE_FILES, there := side_digests(out)) == there
        return whole and is_as_written and not recipe_differs(found, wanted)
    except (MegamaskError, OSError):  # OSError: a name that cannot be one
        return False


def _write(
    base: BaseModel,
    arch: Architecture,
    out: Path,
    reader: WeightSource,
    found: Found,
    made_from: Mapping[str, Any],
    patterns: str,
) -> None:
    """Write the folder, check that it can be read, and say what a mask loses before and after."""
    shares = found.summary()

    def finish(folder: Path) -> None:
        base.complete(folder, out.name)
        stamp = {
            "megamask": __version__,
            "made_from": made_from,
            "removed_importance": shares,
            WRITTEN: BaseModel(folder, ignore_keys=base.ignore_keys).fingerprints().exact,
            SIDE_FILES: side_digests(folder),
        }
        storage.write_json(folder / STAMP, {**stamp, **own_files(folder)})

    tensors = reordered_streamed(reader, arch, found.orders)
    layout = base.layout()
    write_hf(out, tensors, base.hf_dir, finish=finish, layout=layout, config=base.config)
    for kind, (before, after) in shares.items():
        tell(f"{kind:<7} a {patterns} mask removes {before:.2%} -> {after:.2%}")
