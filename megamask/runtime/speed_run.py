"""A measurement from the first shape to the rate of generation, kept after each part."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from megamask import storage
from megamask.config.nested import what_differs
from megamask.config.speed_tree import SpeedSection
from megamask.errors import ArtifactError, ConfigError, MegamaskError
from megamask.runtime.accelerate import accelerate_on, grouped
from megamask.runtime.generation import likely_tokens, measure_generation, random_prompts
from megamask.runtime.measure_speed import Device, measure_shape
from megamask.runtime.sparse_kernels import DTYPES
from megamask.runtime.speed_subject import Subject
from megamask.runtime.speed_table import FILE, MOST_TOKENS, Passes, Row, SpeedTable, read_table

log = logging.getLogger(__name__)
NO_GAIN = "gains by no 2:4 kernel with this workload, and stays dense"


def passes_of(section: SpeedSection) -> Passes:
    """The passes of the workload: one over the prompts, whose result is the first token of each
    answer, and one for each later token.

    Raises:
        ConfigError: the prompts together have too many tokens.
    """
    whole = section.prompt * section.batch
    if whole > MOST_TOKENS:
        allowed = (
            f"speed.prompt x speed.batch is {whole:,}, and at most {MOST_TOKENS:,} is possible"
        )
        raise ConfigError("speed.batch", section.batch, allowed, "Lower one of the two.")
    passes = {whole: 1}
    if section.generate > 1:
        passes[section.batch] = passes.get(section.batch, 0) + section.generate - 1
    return passes


def check_positions(section: SpeedSection, subject: Subject) -> None:
    """Check that the model has places for a prompt and its answer.

    Raises:
        ConfigError: it has not.
    """
    length, most = section.prompt + section.generate, subject.arch.max_positions
    if subject.folder is not None and length > most:
        allowed = (
            f"prompt and answer have {length:,} tokens, and {subject.name} has {most:,} places"
        )
        raise ConfigError("speed.prompt", section.prompt, allowed, "Lower it or speed.generate.")


def measure(
    section: SpeedSection, subject: Subject, device: Device, folder: Path
) -> dict[str, Any]:
    """Measure all shapes and, of a folder, the rate of generation. ``speed.json`` in ``folder`` is
    written after each shape, and a run that was killed goes on with the next.

    Returns:
        The content of ``speed.json``.
    """
    passes, file = passes_of(section), folder / FILE
    tokens = sorted({*section.tokens, *passes})
    made_from = storage.as_read(
        {
            **subject.facts(),
            **device.facts().as_json(),
            "workload": [section.prompt, section.generate, section.batch],
            "dtype": section.dtype,
            "tokens": tokens,
            "rounds": section.rounds,
        }
    )
    rows, generation = _done(file, made_from, len(tokens) * len(device.kernels))

    def keep() -> dict[str, Any]:
        table = SpeedTable(device.facts(), passes, rows).as_json()
        results = {**table, "made_from": made_from, "generation": generation}
        storage.write_json(file, results)
        return results

    left = [shape for shape in subject.shapes if shape not in {row.shape for row in rows}]
    for number, shape in enumerate(left, start=1):
        found = list(measure_shape(device, shape, DTYPES[section.dtype], tokens, section.rounds))
        rows += found
        keep()
        log.info("  shape %d/%d  %d x %d: %s", number, len(left), *shape, _best(found))
    if subject.folder is not None and section.generate and generation is None:
        table = SpeedTable(device.facts(), passes, rows)
        generation = _generation(section, subject, subject.folder, device, table)
    return keep()


def _done(file: Path, made_from: dict[str, Any], of_shape: int) -> tuple[list[Row], Any]:
    """The rows of whole shapes and the generation that a run before measured under the same
    conditions.
    """
    try:
        found = storage.read_object(file, "", {"made_from": dict})
        rows = list(read_table(file).rows)
    except MegamaskError:
        return [], None
    whole = [row.shape for row in rows]
    other = what_differs(found["made_from"], made_from)
    if other or any(whole.count(one) != of_shape for one in whole):
        log.info("%s was measured with other %s: measured again", file, other or "kernels")
        return [], None
    log.info("%s: %d shapes are reused", file, len(set(whole)))
    return rows, found.get("generation")


def _best(rows: Iterable[Row]) -> str:
    """The largest gain among rows."""
    timed = [row for row in rows if row.speed_up]
    best = max(timed, key=lambda row: row.speed_up[1], default=None)
    return "no 2:4 product" if best is None else f"{best.verdict()} at {best.tokens} tokens"


def _generation(
    section: SpeedSection, subject: Subject, folder: Path, device: Device, table: SpeedTable
) -> dict[str, Any]:
    """The rates of the model as it is and with 2:4 kernels, one after the other. Of a model whose
    linears take no such kernel (``Conv1D`` of GPT-2), or gain by none, the first alone and why: the
    second would be of the same dense model.
    """
    from transformers import AutoModelForCausalLM

    log.info("loading %s", folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[section.dtype])
    model: nn.Module = loaded.eval().to(device.place)
    prompts = random_prompts(subject.arch.vocab, section.batch, section.prompt, device)

    def rates() -> dict[str, Any]:
        found = measure_generation(model, prompts, section.generate, device, section.rounds)
        log.info("  %.1f tokens/s", found.rate)
        return found.as_json()

    dense, before = rates(), likely_tokens(model, prompts)
    try:
        choices = accelerate_on(model, device, table, None, quiet=True)
    except ArtifactError as error:
        return {"dense": dense, "why": error.problem}
    found = {"dense": dense, "choices": [asdict(one) for one in grouped(choices)]}
    if not any(one.kernel for one in choices):
        return {**found, "why": NO_GAIN}
    same = (before == likely_tokens(model, prompts)).float().mean()
    return {**found, "2:4": rates(), "same_token": float(same)}
