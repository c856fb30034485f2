"""The verb sensitivity: how much the loss rises when one layer or linear alone is pruned, and which
of them a budget keeps dense.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamask import storage
from megamask.config import Config
from megamask.data.heldout import evaluated_domains
from megamask.errors import ConfigError, MegamaskError
from megamask.evaluate.dense_budget import refuse_to_replace
from megamask.evaluate.loaded_model import LoadedModel
from megamask.evaluate.measured_text import measured_text
from megamask.evaluate.sensitivity import (
    Part,
    PartLosses,
    increases,
    kept_dense,
    parts_of,
    ranked,
    whole_masks,
)
from megamask.masks.find import open_masks
from megamask.masks.verify import check_asked
from megamask.model.mask_shards import linear_rules
from megamask.model.settled_masks import settled
from megamask.parallel.mesh import Mesh, start
from megamask.prepare.layout import check_positions, evaluated_length
from megamask.prepare.run_inputs import RunInputs
from megamask.sparsity.pattern_plan import PatternPlan
from megamask.terminal import tell
from megamask.weights.mapping import linear_shapes
from megamask.weights.model_identity import model_facts_of, recipe_differs

log = logging.getLogger(__name__)
NAME = "sensitivity"


def run(config: Config) -> None:
    """Measure every part, and write ``sensitivity.json``, ``.md`` and ``.png`` to the run folder.
    The JSON file is written after each part and each row, and a run that was killed goes on with
    the next.

    Raises:
        MegamaskError: weights, shards or the mask are missing or do not fit; found before anything
            is computed.
    """
    inputs, section = RunInputs(config), config.sensitivity
    paths, length = inputs.paths, evaluated_length(config)
    if not config.evaluate.is_published:
        evaluated_domains(config)
    inputs.layout.check_lengths(config, (length,))
    storage.require_writable(paths.run_dir)
    masks = whole_masks(open_masks(section.mask, config, inputs.arch), "sensitivity.mask")
    check_asked(masks, inputs.arch, config)
    masks.check(shapes=linear_shapes(inputs.arch), fingerprint=inputs.fingerprint)
    inputs.layout.check_model(inputs.arch)
    check_positions(config, inputs.arch, (length,))
    text = measured_text(inputs)
    parts = parts_of(inputs.arch, masks.keys(), section.by)
    made_from: dict[str, Any] = storage.as_read(
        {
            "fingerprint": inputs.fingerprint,
            "masks": masks.content_sha256,
            "method": masks.method,
            "pattern": masks.patterns.facts(),
            "by": section.by,
            "linears": sorted(masks),
            "parts": [part.name for part in parts],
            "protocol": text.facts,
            **model_facts_of(inputs.note),
        }
    )
    refuse_to_replace(config, made_from)
    if too_many := [count for count in section.rows if count > len(parts)]:
        allowed = f"numbers of parts, of which there are {len(parts)}"
        raise ConfigError("sensitivity.rows", too_many[0], allowed, "Remove it.")
    with start(config) as mesh:
        mesh.require_same("inputs", made_from)
        file = paths.run_dir / f"{NAME}.json"
        done = mesh.from_main(_done(file, made_from))
        is_left = len(done["loss"]) < len(parts) or {*map(str, section.rows)} - {*done["rows"]}
        copy = paths.run_dir / f"{NAME}-mask.safetensors"
        if is_left:
            loaded = LoadedModel(config, paths, inputs.arch, mesh)
            masks = settled(masks, copy, mesh)
            losses = PartLosses(config, loaded, masks, text.windows)
            _measure(losses, mesh, parts, done, file)
            _measure_rows(losses, mesh, parts, done, file)
        if mesh.is_main:
            _write(config, paths.run_dir, done)
            copy.unlink(missing_ok=True)


def _done(file: Path, made_from: dict[str, Any]) -> dict[str, Any]:
    """What a run before measured under the same conditions, or nothing."""
    nothing: dict[str, Any] = {"made_from": made_from, "dense": None, "loss": {}, "rows": {}}
    try:
        found = storage.read_object(file, "", {key: dict for key in nothing})
    except MegamaskError:
        return nothing
    names = made_from["parts"]
    other = recipe_differs(_deciding(found["made_from"]), _deciding(made_from))
    if other or list(found["loss"]) != names[: len(found["loss"])]:
        log.info("%s was made from other %s: made again", file, other or "parts")
        return nothing
    log.info("%s: %d of %d parts are reused", file, len(found["loss"]), len(names))
    return {key: found[key] for key in nothing}


def _deciding(made_from: Mapping[str, Any]) -> dict[str, Any]:
    """Without what decides no loss: how the place of the text is spelled, beside its digest, and
    how much of it a comparison with the dense model would take.
    """
    protocol = made_from.get("protocol")
    known = dict(protocol) if isinstance(protocol, Mapping) else {}
    for key in ("text", "documents", "compared_targets"):
        known.pop(key, None)
    return {**made_from, "protocol": known}


def _measure_rows(
    losses: PartLosses, mesh: Mesh, parts: list[Part], done: dict[str, Any], file: Path
) -> None:
    """Measure the masked model with so many of the most sensitive parts kept dense, into ``done``,
    which the file gets after each row: count -> its parts, the density and the losses. Rows that
    the file has stay, whether they are asked for or not.
    """
    order, arch = ranked(done["dense"], done["loss"]), losses.loaded.arch
    for count in losses.config.sensitivity.rows:
        if str(count) in done["rows"]:
            continue
        dense = order[:count]
        pruned = [part for part in parts if part.name not in dense]
        found = losses.pruned(pruned, f"{count} parts dense")
        rules = linear_rules(arch)
        names = [name for part in pruned for one in part.linears for name in rules[one].modules]
        left = PatternPlan(
            {name: losses.masks.patterns[name] for name in names if name in losses.masks}
        )
        density = left.density_of(linear_shapes(arch))
        row = {"loss": found, "kept_dense": dense, "density": density}
        done["rows"] = dict(sorted({**done["rows"], str(count): row}.items(), key=_count))
        if mesh.is_main:
            storage.write_json(file, _results(losses.config, done))
            shown = "  ".join(f"{name} {loss:.4f}" for name, loss in found.items())
            log.info("  %d parts dense  %s", count, shown)


def _count(row: tuple[str, Any]) -> int:
    return int(row[0])


def _measure(
    losses: PartLosses, mesh: Mesh, parts: list[Part], done: dict[str, Any], file: Path
) -> None:
    """Measure the parts that are left into ``done``, which the file gets after each."""
    begin, before = time.perf_counter(), len(done["loss"])
    done["dense"] = done["dense"] or losses.dense()
    for number, part in enumerate(parts[before:], start=before + 1):
        found = losses.pruned([part], part.name)
        done["loss"][part.name] = found
        if not mesh.is_main:
            continue
        storage.write_json(file, done)
        seconds = time.perf_counter() - begin
        left = seconds / (number - before) * (len(parts) - number)
        shown = "  ".join(
            f"{domain} {more:+.4f}"
            for domain, more in increases(done["dense"], {part.name: found})[part.name].items()
        )
        text = "  part %d/%d  %s  %s  (%.1f s, about %.0f s left)"
        log.info(text, number, len(parts), part.name, shown, seconds, left)


def _results(config: Config, done: dict[str, Any]) -> dict[str, Any]:
    """The content of the file when all parts are measured: ``done`` and the budget's choice."""
    dense, rows, share = done["dense"], done["loss"], config.sensitivity.keep_dense
    return {
        **done,
        "increase": increases(dense, rows),
        "ranked": ranked(dense, rows),
        "keep_dense": share,
        "kept_dense": kept_dense(dense, rows, share),
    }


def _write(config: Config, folder: Path, done: dict[str, Any]) -> None:
    """Write the budget's choice, the table and the picture, and print the table."""
    from megamask.report import plot_style
    from megamask.report.sensitivity_picture import sensitivity_picture
    from megamask.report.sensitivity_table import sensitivity_table

    results = _results(config, done)
    storage.write_json(folder / f"{NAME}.json", results)
    text = sensitivity_table(results)
    storage.write_text(folder / f"{NAME}.md", f"{text}\n")
    increase, kept = results["increase"], results["kept_dense"]
    plot_style.save(
        lambda: sensitivity_picture(list(increase), increase, kept), folder / f"{NAME}.png"
    )
    log.info("wrote %s", folder / f"{NAME}.json")
    tell(text)
