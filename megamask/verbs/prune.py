"""The verb prune: one-shot masks of the dense model, in plain python or under torchrun."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from megamask import storage
from megamask.config import Config, run_paths
from megamask.data.heldout import calibration_description, calibration_tokens
from megamask.errors import ConfigError, MegamaskError
from megamask.evaluate.dense_budget import with_dense_budget
from megamask.masks.file import load_masks
from megamask.masks.header import Facts
from megamask.masks.identity import OUTSIDE_DATA, recipe_of
from megamask.masks.margins import load_margins, save_margins
from megamask.masks.save import save_codes
from megamask.masks.times import write_seconds
from megamask.model.build import DTYPES
from megamask.model.checkpoint import float16_fingerprints
from megamask.model.mask_shards import gather_codes, hf_shapes
from megamask.model.updated_weights import save_updated
from megamask.oneshot.criteria import find_criterion
from megamask.oneshot.criterion import Criterion
from megamask.oneshot.gradient_sweep import sweep
from megamask.oneshot.layerwise import PrunedShard, PruningJob, damping, passes, prune_layerwise
from megamask.oneshot.stats import GradientStats
from megamask.parallel.mesh import start
from megamask.prepare.dense_model import load_dense
from megamask.prepare.layout import check_positions
from megamask.prepare.run_inputs import RunInputs
from megamask.safe_checkpoint import NOTE, read_index
from megamask.sparsity.margins import to_levels
from megamask.weights.model_identity import model_facts_of, recipe_differs

log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Write the mask file of every method of ``prune.methods``, unless there is one that was made
    from the same inputs.

    ``sparsegpt_update`` also writes ``updated_weights``: Megatron weights in the dtype of the dense
    weights.

    Raises:
        MegamaskError: a setting or an artefact that does not fit, before the first layer where
            possible.
    """
    check_early(RunInputs(config))
    config = with_dense_budget(config)
    inputs = RunInputs(config)
    methods: list[str] = [*config.prune.methods]
    recipes = {method: recipe(inputs, method) for method in methods}
    todo = {method: one for method, one in recipes.items() if not is_done(config, method, one)}
    if not todo and inputs.layout.tp * inputs.layout.dp == 1:
        return
    inputs.layout.check_model(inputs.arch)
    inputs.layout.check_rows(inputs.arch, inputs.plan)
    criteria = {method: find_criterion(method, config.prune) for method in methods}
    if any(criteria[method].needs_text for method in todo):
        check_positions(config, inputs.arch, ("calibration.seq_length",))
    inputs.check_text()
    with start(config) as mesh:
        mesh.require_same("inputs", {**inputs.facts, "masks": recipes})
        todo = {method: one for method, one in recipes.items() if mesh.from_main(method in todo)}
        if not todo:
            return
        dense = load_dense(inputs, mesh)
        model = dense.model.eval()
        job = PruningJob(config, mesh, inputs.arch, inputs.plan, model, dense.linears)
        criteria = {method: criteria[method] for method in todo}
        needs_text = any(one.needs_text for one in criteria.values())
        tokens_NS = calibration_tokens(config) if needs_text else None
        gradients, begin = None, time.perf_counter()
        if any(one.needs_gradients for one in criteria.values()):
            assert tokens_NS is not None
            gradients = sweep(job, tokens_NS)
        measured = Measured(tokens_NS, gradients, time.perf_counter() - begin)
        for together in passes(config, criteria):
            prune(job, together, measured, todo, inputs.note)


def check_early(inputs: RunInputs) -> None:
    """Every setting that can be refused before a file is read, and the output folders.

    Raises:
        MegamaskError: no method, or a layout, pattern, block or output folder that cannot work.
    """
    config, layout = inputs.config, inputs.layout
    if not config.prune.methods:
        fix = "Name a method, or leave the verb out."
        raise ConfigError("prune.methods", [], "at least one method", fix)
    criteria = [find_criterion(method, config.prune) for method in config.prune.methods]
    for one in criteria:
        for pattern in inputs.patterns:
            one.check(pattern, config.prune)
    if any(one.needs_text for one in criteria):
        layout.check_lengths(config, ("calibration.seq_length",))
    if any(one.needs_gradients for one in criteria) and config.calibration.seq_length < 2:
        length, fix = config.calibration.seq_length, "Raise it, or leave these methods out."
        allowed = "at least 2, for a gradient needs a token that is predicted"
        raise ConfigError("calibration.seq_length", length, allowed, fix)
    storage.require_writable(inputs.paths.masks)
    if any(one.updates_weight for one in criteria):
        storage.require_writable(inputs.paths.run_dir)


def recipe(inputs: RunInputs, method: str) -> dict[str, Any]:
    """Everything that decides the masks of ``method``, as JSON values.

    Layout and micro-batch are left out, because they change the masks by rounding alone.

    Raises:
        MegamaskError: weights that are missing, ``model.include`` and ``model.exclude`` that do not
            fit the model, or calibration text that is not there.
    """
    config, criterion = inputs.config, find_criterion(method, inputs.config.prune)
    settings: dict[str, Any] = {
        "fingerprint": inputs.fingerprint,
        "pattern": inputs.plan.facts(),
        "linears": inputs.modules,
        **model_facts_of(inputs.note),
    }
    if criterion.needs_text:
        settings |= {"calibration": calibration_description(config)}
    # Magnitudes are those of weights in this dtype; files of before say it only where text does.
    if criterion.needs_text or f"torch.{inputs.note['dtype']}" != str(DTYPES[config.dtype]):
        settings["dtype"] = config.dtype
    if criterion.needs_stats and config.prune.inputs != "pruned":
        settings["inputs"] = config.prune.inputs  # files of before do not name their inputs
    if budget := config.model.exclude_sensitive:
        settings["exclude_sensitive"] = budget
    settings |= {name: getattr(config.prune, name) for name in criterion.reads}
    settings |= criterion.facts
    plain: dict[str, Any] = storage.as_read(settings)
    return plain


def is_done(config: Config, method: str, wanted: Mapping[str, Any]) -> bool:
    """Whether the mask file of ``method``, its margins and its updated weights were made from the
    ``wanted`` recipe. The log says which files are reused, and why others are not.
    """
    path, updated = run_paths(config).mask(method), run_paths(config).updated_weights(method)
    if not path.exists():
        return False
    try:
        masks = load_masks(path)
        masks.verify()
        found = {
            **recipe_of(masks.meta),
            "fingerprint": masks.fingerprint,
            "pattern": masks.patterns.facts(),
            "linears": list(masks),
        }
        other = recipe_differs(found, wanted)
        if not other:
            load_margins(path, masks.content_sha256).check_whole()
        if not other and find_criterion(method, config.prune).updates_weight:
            note = storage.read_object(updated / NOTE, "", {"recipe": dict})
            read_index(updated)
            other = recipe_differs(note["recipe"], wanted)
    except (MegamaskError, KeyError, TypeError) as error:  # torn, or written by something else
        log.info("%s: made again: %s", path, error)
        return False
    log.info("%s: %s", path, f"made from other {other}: made again" if other else "reused")
    return not other


@dataclass(frozen=True)
class Measured:
    """What the methods of a run share, as far as they need it: the samples and their gradients,
    and the seconds of the sweep that measured these.
    """

    tokens_NS: torch.Tensor | None
    gradients: dict[str, GradientStats] | None
    sweep_seconds: float


def prune(
    job: PruningJob,
    criteria: Mapping[str, Criterion],
    measured: Measured,
    recipes: Mapping[str, dict[str, Any]],
    base: dict[str, Any],
) -> None:
    """Run the methods of one pass, and write their files. The time of a method is what it takes
    alone: the whole pass, and the sweep for gradients where it needs them.
    """
    mesh, begin = job.mesh, time.perf_counter()
    if mesh.is_main:
        log.info("%s: %s of %d linears", ", ".join(criteria), job.plan, len(job.linears))
    pruned = prune_layerwise(job, criteria, measured.tokens_NS, measured.gradients)
    seconds = time.perf_counter() - begin
    for method, one in criteria.items():
        own = seconds + measured.sweep_seconds * one.needs_gradients
        write(job, method, pruned.pop(method), recipes[method], base, own)


def write(
    job: PruningJob,
    method: str,
    pruned: Mapping[str, PrunedShard],
    made_from: dict[str, Any],
    base: dict[str, Any],
    seconds: float,
) -> None:
    """Write the files of one method.

    The mask file is written after the updated weights: where it is there, they are whole. The
    margins name the masks that they belong to, so they come last.
    """
    paths, mesh, begin = run_paths(job.config), job.mesh, time.perf_counter()
    if find_criterion(method, job.config.prune).updates_weight:
        updated = ((name, one.weight_OI) for name, one in pruned.items())
        weights_OI = {name: weight_OI for name, weight_OI in updated if weight_OI is not None}
        path, note = paths.updated_weights(method), {**base, "method": method, "recipe": made_from}
        save_updated(job.config, job.arch, mesh, weights_OI, path, note)
        if mesh.is_main:
            log.info("wrote %s", path)
    shapes, arch = hf_shapes(pruned, job.arch), job.arch
    bits_of = {name: partial(_bits, job, name, one) for name, one in pruned.items()}
    bits = gather_codes(bits_of, arch, mesh)
    if mesh.is_main:
        write_masks(
            job,
            method,
            bits,
            shapes,
            made_from,
            damping(job, pruned),
            seconds + time.perf_counter() - begin,
            float16_fingerprints(base),
        )
    _take_part(bits)
    codes_of = {name: partial(one.margin_codes_OI.to, mesh.device) for name, one in pruned.items()}
    codes = gather_codes(codes_of, arch, mesh)
    if mesh.is_main:
        masks = load_masks(paths.mask(method))
        levels = ((name, to_levels(codes_OI)) for name, codes_OI in codes)
        save_margins(paths.margins(method), masks.content_sha256, shapes, levels)
    _take_part(codes)
    mesh.barrier()


def _bits(job: PruningJob, name: str, one: PrunedShard) -> torch.Tensor:
    """The mask of a shard as ``Pattern.bits_of`` writes it, (O, G)."""
    return job.patterns[name].bits_of(one.mask_OI.to(job.mesh.device))


def _take_part(gathered: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Let the ranks that write nothing take part in gathering."""
    for _ in gathered:
        pass


def write_masks(
    job: PruningJob,
    method: str,
    bits: Iterable[tuple[str, torch.Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    made_from: dict[str, Any],
    raised_damp: dict[str, float],
    seconds: float,
    copies: tuple[str, ...],
) -> None:
    """Write the time and the mask file, whose header keeps the rest of the recipe as ``data``."""
    data = {key: value for key, value in made_from.items() if key not in OUTSIDE_DATA}
    if raised_damp:
        data["raised_damp"] = raised_damp
    facts = Facts(
        made_from["fingerprint"],
        method,
        data=data,
        updated_weights=find_criterion(method, job.config.prune).updates_weight,
        float16_fingerprints=copies,
    )
    path = run_paths(job.config).mask(method)
    write_seconds(path, seconds)
    save_codes(
        path,
        {name: shapes[name] for name in made_from["linears"]},
        bits,
        lambda numbers, pattern: pattern.index_of_bits(numbers),
        job.plan,
        facts,
    )
    log.info("wrote %s, %.1f s", path, seconds)
