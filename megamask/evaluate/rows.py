"""Perplexity of the dense model and of every mask of a run, by domain, and how far each masked
model is from the dense model.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamask import storage
from megamask.config import Config, RunPaths
from megamask.config.paths import DENSE
from megamask.data.windows import Windows
from megamask.errors import ArtifactError
from megamask.evaluate.comparison import DenseOutputs, Sums, run_dense, run_masked
from megamask.evaluate.loaded_model import LoadedModel
from megamask.evaluate.measured_text import MeasuredText
from megamask.masks.file import MaskSet
from megamask.masks.identity import identity
from megamask.masks.times import seconds_of
from megamask.model.perplexity import exp_of_mean, summed_loss
from megamask.parallel.mesh import Mesh
from megamask.weights.architecture import Architecture

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """A row of the table, each by domain.

    Attributes:
        perplexity: exp of the mean loss over all targets.
        kl: KL(dense || masked) in nats a token, over the compared targets; empty for the dense
            model, and where nothing is compared.
        agreement: share of the compared targets at which both models have the same most likely
            token; empty likewise.
    """

    perplexity: dict[str, float]
    kl: dict[str, float]
    agreement: dict[str, float]


class Rows:
    """The rows of the table of perplexities, computed on one model.

    Args:
        config: the settings.
        paths: the paths of the run.
        arch: the architecture of the model.
        mesh: process groups and device of this rank.
        text: what is measured, and how much of it is compared.
    """

    def __init__(
        self,
        config: Config,
        paths: RunPaths,
        arch: Architecture,
        mesh: Mesh,
        text: MeasuredText,
    ) -> None:
        self.config, self.mesh, self.text = config, mesh, text
        self.loaded = LoadedModel(config, paths, arch, mesh)
        self.model = self.loaded.model
        self.outputs: dict[str, DenseOutputs] = {}

    def dense(self) -> Row:
        """The row of the dense model, which comes first."""

        def compared(domain: str, windows: Windows) -> Sums:
            found = run_dense(self.model, self.mesh, windows, self.config.evaluate.micro_batch)
            self.outputs[domain] = found
            return found.sums

        found = self._row(DENSE, None, compared)
        return Row(found.perplexity, {}, {})

    def masked(self, method: str, masks: MaskSet) -> Row:
        """The row of the model under ``masks``, on the weights that they belong to."""

        def compared(domain: str, _: Windows) -> Sums:
            outputs, micro_batch = self.outputs[domain], self.config.evaluate.micro_batch
            return run_masked(self.model, self.mesh, outputs, micro_batch)

        return self._row(method, masks, compared)

    def _row(
        self,
        method: str,
        masks: MaskSet | None,
        compared: Callable[[str, Windows], Sums],
    ) -> Row:
        weights = self.loaded.use(masks)
        micro_batch = self.config.evaluate.micro_batch
        begin = time.perf_counter()
        row = Row({}, {}, {})
        for domain, windows in self.text.windows.items():
            count = self.text.compared[domain]
            loss = summed_loss(self.model, self.mesh, windows[count:], micro_batch)
            if count:
                sums = compared(domain, windows[:count])
                loss += sums.loss
                row.kl[domain] = sums.kl / sums.targets
                row.agreement[domain] = sums.agreements / sums.targets
            row.perplexity[domain] = exp_of_mean(loss, windows.targets)
            if math.isnan(row.perplexity[domain]):
                raise not_finite_outputs(weights, domain, method)
        if self.mesh.is_main:
            values = "  ".join(f"{domain} {value:.2f}" for domain, value in row.perplexity.items())
            log.info("%-18s %s  (%.1f s)", method, values, time.perf_counter() - begin)
        return row


def not_finite_outputs(weights: Path, text: str, row: str) -> ArtifactError:
    """The error of weights whose outputs on a text are not finite, in a row of the table."""
    problem = f"give outputs that are not finite on {text} (row {row})"
    fix = "Convert a model whose weights are finite; megamask convert names the tensor."
    return ArtifactError(weights, problem, fix)


def by_quantity(rows: dict[str, Row]) -> dict[str, dict[str, dict[str, float]]]:
    """The rows as ``results.json`` has them: quantity -> row -> domain -> value. A quantity that no
    row has is left out.
    """
    found = {
        "perplexity": {name: row.perplexity for name, row in rows.items()},
        "kl": {name: row.kl for name, row in rows.items() if row.kl},
        "agreement": {name: row.agreement for name, row in rows.items() if row.agreement},
    }
    return {quantity: values for quantity, values in found.items() if values}


def facts_beside(
    paths: RunPaths,
    masks: dict[str, MaskSet],
    text: MeasuredText,
    shapes: Mapping[str, Sequence[int]],
) -> dict[str, Any]:
    """The content of ``results.json`` beside the perplexities. A file is read, so the facts are put
    together before anything is measured.

    Args:
        paths: the paths of the run.
        masks: method -> masks.
        text: what the perplexities are measured on.
        shapes: (O, I) of every linear that may be pruned.

    Raises:
        ArtifactError: ``stages.json``, or the time beside a mask, cannot be read.
    """
    stages_file = paths.run_dir / "stages.json"
    stages = storage.read_object(stages_file, "Delete it.", {}) if stages_file.exists() else {}
    found = {name: seconds_of(mask_set) for name, mask_set in masks.items()}
    seconds = {name: taken for name, taken in found.items() if taken is not None}
    return {
        "protocol": text.facts,
        # A stage of the name of a row, such as learn, is not the time of its mask.
        "seconds": {key: one for key, one in stages.items() if key not in found} | seconds,
        "density": {DENSE: 1.0} | {name: each.density_of(shapes) for name, each in masks.items()},
        "mask_bytes": {name: each.size for name, each in masks.items() if each.path.is_file()},
        "masks": mask_digests(masks),
        "pattern": mask_patterns(masks),
    }


def mask_patterns(masks: Mapping[str, MaskSet]) -> dict[str, str]:
    """Row -> the pattern of its mask, or its patterns: ``2:4``, ``2:4 and 6:8``."""
    return {name: str(each.patterns) for name, each in masks.items()}


def mask_digests(masks: Mapping[str, MaskSet]) -> dict[str, dict[str, str]]:
    """Row -> what tells its mask and weights from all others: a row belongs to these, and to no
    other mask of the same name, nor to other weights under the same mask.
    """
    return {name: identity(each) for name, each in masks.items()}
