"""The verb prune: one-shot masks of the dense model, in plain python or under torchrun."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megamask import storage
from megamask.config import Config, run_paths
from megamask.data.heldout import calibration_description, calibration_tokens
from megamask.errors import ConfigError, MegamaskError
from megamask.masks.file import load_masks
from megamask.masks.header import Facts
from megamask.masks.margins import load_margins, save_margins
from megamask.masks.save import save_codes
from megamask.masks.times import write_seconds
from megamask.model.build import build_model, masked_linears, padded_vocab
from megamask.model.checkpoint import (
    float16_fingerprints,
    load_weights,
    save_sharded,
    sharded_state,
)
from megamask.model.mask_shards import gather_codes, hf_shapes
from megamask.oneshot.criteria import CRITERIA
from megamask.oneshot.layerwise import PrunedShard, PruningJob, damping, prune_layerwise
from megamask.parallel.mesh import start
from megamask.prepare.dense_model import load_dense
from megamask.prepare.layout import check_positions
from megamask.prepare.run_inputs import RunInputs
from megamask.safe_checkpoint import NOTE
from megamask.sparsity.margins import to_levels

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
    inputs = RunInputs(config)
    check_early(inputs)
    recipes = {method: recipe(inputs, method) for method in config.prune.methods}
    todo = {method: one for method, one in recipes.items() if not is_done(config, method, one)}
    if not todo and inputs.layout.tp * inputs.layout.dp == 1:
        return
    inputs.layout.check_model(inputs.arch)
    inputs.layout.check_rows(inputs.arch, inputs.modules, inputs.pattern)
    if any(CRITERIA[method].needs_stats for method in todo):
        check_positions(config, inputs.arch, ("calibration.seq_length",))
    inputs.check_text()
    with start(config) as mesh:
        todo = {method: one for method, one in recipes.items() if mesh.from_main(method in todo)}
        if not todo:
            return
        dense = load_dense(inputs, mesh)
        job = PruningJob(
            config, mesh, inputs.arch, inputs.pattern, dense.model.eval(), dense.linears
        )
        needs_text = any(CRITERIA[method].needs_stats for method in todo)
        tokens_NS = calibration_tokens(config) if needs_text else None
        for method, one in todo.items():
            prune(job, method, tokens_NS, one, inputs.note)


def check_early(inputs: RunInputs) -> None:
    """Every setting that can be refused before a file is read, and the output folders.

    Raises:
        MegamaskError: no method, or a layout, pattern, block or output folder that cannot work.
    """
    config, layout, pattern = inputs.config, inputs.layout, inputs.pattern
    if not config.prune.methods:
        fix = "Name a method, or leave the verb out."
        raise ConfigError("prune.methods", [], "at least one method", fix)
    for method in config.prune.methods:
        CRITERIA[method].check(pattern, config.prune)
    if any(CRITERIA[method].needs_stats for method in config.prune.methods):
        layout.check_lengths(config, ("calibration.seq_length",))
    storage.require_writable(inputs.paths.masks)
    if any(CRITERIA[method].updates_weight for method in config.prune.methods):
        storage.require_writable(inputs.paths.run_dir)


def recipe(inputs: RunInputs, method: str) -> dict[str, Any]:
    """Everything that decides the masks of ``method``, as JSON values.

    Layout and micro-batch are left out, because they change the masks by rounding alone.

    Raises:
        MegamaskError: weights that are missing, ``model.include`` and ``model.exclude`` that do not
            fit the model, or calibration text that is not there.
    """
    config, criterion = inputs.config, CRITERIA[method]
    settings: dict[str, Any] = {
        "fingerprint": inputs.fingerprint,
        "pattern": str(inputs.pattern),
        "linears": inputs.modules,
    }
    if criterion.needs_stats:
        settings |= {"dtype": config.dtype, "calibration": calibration_description(config)}
    if criterion.needs_hessian:
        settings |= {"damp": config.prune.damp, "block": config.prune.block}
    plain: dict[str, Any] = json.loads(json.dumps(settings))  # what a file gives back
    return plain


def is_done(config: Config, method: str, wanted: Mapping[str, Any]) -> bool:
    """Whether the mask file of ``method``, its margins and its updated weights were made from the
    ``wanted`` recipe. The log says which files are reused.
    """
    path, updated = run_paths(config).mask(method), run_paths(config).updated_weights(method)
    if not path.exists():
        return False
    try:
        masks = load_masks(path)
        masks.verify()
        found = {
            **masks.meta["data"],
            "fingerprint": masks.fingerprint,
            "pattern": str(masks.pattern),
            "linears": list(masks),
        }
        same = all(found[key] == value for key, value in wanted.items())
        if same:
            load_margins(path, masks.content_sha256).check_whole()
        if same and CRITERIA[method].updates_weight:
            same = storage.read_json(updated / NOTE, "")["recipe"] == wanted
    except (MegamaskError, KeyError, TypeError):  # torn, or written by something else
        same = False
    log.info("%s: %s", path, "reused" if same else "made from other inputs or settings: made again")
    return same


def prune(
    job: PruningJob,
    method: str,
    tokens_NS: torch.Tensor | None,
    made_from: dict[str, Any],
    base: dict[str, Any],
) -> None:
    """Run one method and write its files.

    The mask file is written after the updated weights: where it is there, they are whole. The
    margins name the masks that they belong to, so they come last.
    """
    paths, mesh, begin = run_paths(job.config), job.mesh, time.perf_counter()
    if mesh.is_main:
        log.info("%s: %s of %d linears", method, job.pattern, len(job.linears))
    pruned = prune_layerwise(job, CRITERIA[method], tokens_NS)
    if CRITERIA[method].updates_weight:
        write_updated(
            job,
            pruned,
            paths.updated_weights(method),
            {**base, "method": method, "recipe": made_from},
        )
    shapes, arch = hf_shapes(pruned, job.arch), job.arch
    bits_of = {name: partial(job.pattern.bits_of, one.mask_OI) for name, one in pruned.items()}
    bits = gather_codes(bits_of, arch, mesh)
    if mesh.is_main:
        write_masks(
            job,
            method,
            bits,
            shapes,
            made_from,
            damping(job, pruned),
            time.perf_counter() - begin,
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
    own = ("fingerprint", "pattern", "linears")
    data = {key: value for key, value in made_from.items() if key not in own}
    if raised_damp:
        data["raised_damp"] = raised_damp
    facts = Facts(
        made_from["fingerprint"],
        method,
        data=data,
        updated_weights=CRITERIA[method].updates_weight,
        float16_fingerprints=copies,
    )
    path = run_paths(job.config).mask(method)
    write_seconds(path, seconds)
    save_codes(
        path,
        {name: shapes[name] for name in made_from["linears"]},
        bits,
        job.pattern.index_of_bits,
        job.pattern,
        facts,
    )
    log.info("wrote %s, %.1f s", path, seconds)


def write_updated(
    job: PruningJob, pruned: Mapping[str, PrunedShard], path: Path, note: dict[str, Any]
) -> None:
    """Save the dense weights with the updated weights of ``pruned`` in their places.

    The dtype is that of the dense weights on disk. A second model in this dtype holds the weights
    until they are written, so that a weight that is not pruned keeps every bit.
    """
    mesh, dense = job.mesh, run_paths(job.config).weights
    model = build_model(job.config, job.arch, mesh, dtype=getattr(torch, note["dtype"]))
    load_weights(model, dense)
    linears = masked_linears(model)
    for name, one in pruned.items():
        assert one.weight_OI is not None
        linears[name].weight.data.copy_(one.weight_OI)
    note = {**note, "padded_vocab": padded_vocab(job.arch, mesh.tp)}
    save_sharded(sharded_state(model), path, mesh, note, files=[dense / "config.json"])
    if mesh.is_main:
        log.info("wrote %s", path)
