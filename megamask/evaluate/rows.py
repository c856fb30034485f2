"""Perplexity of the dense model and of every mask of a run, by domain."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import torch

from megamask import storage
from megamask.config import Config, RunPaths
from megamask.errors import ArtifactError
from megamask.evaluate.measured_text import MeasuredText
from megamask.masks.file import MaskSet
from megamask.masks.find import own_weights
from megamask.masks.times import seconds_of
from megamask.model.build import build_model, masked_linears
from megamask.model.checkpoint import load_weights
from megamask.model.mask_shards import fold_masks
from megamask.model.perplexity import perplexity
from megamask.parallel.mesh import Mesh
from megamask.weights.architecture import Architecture

log = logging.getLogger(__name__)
DENSE = "dense"


class Rows:
    """The rows of the table of perplexities, computed on one model.

    The weights of the model are loaded again only for masks that belong to updated weights.

    Args:
        config: the settings.
        paths: the paths of the run.
        arch: the architecture of the model.
        mesh: process groups and device of this rank.
        windows: domain -> tokens (N windows, S sequence).
    """

    def __init__(
        self,
        config: Config,
        paths: RunPaths,
        arch: Architecture,
        mesh: Mesh,
        windows: dict[str, torch.Tensor],
    ) -> None:
        self.config, self.paths, self.arch = config, paths, arch
        self.mesh, self.windows = mesh, windows
        self.model = build_model(config, arch, mesh).eval()
        self.linears = masked_linears(self.model)
        self.loaded: Path | None = None

    def dense(self) -> dict[str, float]:
        """Domain -> perplexity of the dense model."""
        return self._row(DENSE, self.paths.weights, None)

    def masked(self, method: str, masks: MaskSet) -> dict[str, float]:
        """Domain -> perplexity of the model under ``masks``, on the weights that they belong to."""
        return self._row(method, own_weights(masks, self.paths) or self.paths.weights, masks)

    def _row(self, method: str, weights: Path, masks: MaskSet | None) -> dict[str, float]:
        if weights != self.loaded:
            load_weights(self.model, weights)
            self.loaded = weights
        fold_masks(self.linears, masks, self.arch, self.mesh)
        begin = time.perf_counter()
        row = {
            domain: perplexity(self.model, self.mesh, tokens, self.config.evaluate.micro_batch)
            for domain, tokens in self.windows.items()
        }
        for domain, value in row.items():
            if math.isnan(value):
                problem = f"give outputs that are not finite on {domain} (row {method})"
                fix = "Convert a model whose weights are finite; megamask convert names the tensor."
                raise ArtifactError(weights, problem, fix)
        if self.mesh.is_main:
            values = "  ".join(f"{domain} {value:.2f}" for domain, value in row.items())
            log.info("%-18s %s  (%.1f s)", method, values, time.perf_counter() - begin)
        return row


def facts_beside(paths: RunPaths, masks: dict[str, MaskSet], text: MeasuredText) -> dict[str, Any]:
    """The content of ``results.json`` beside the perplexities. A file is read, so the facts are put
    together before anything is measured.

    Args:
        paths: the paths of the run.
        masks: method -> masks.
        text: what the perplexities are measured on.

    Raises:
        ArtifactError: ``stages.json``, or the time beside a mask, cannot be read.
    """
    stages_file = paths.run_dir / "stages.json"
    stages = storage.read_object(stages_file, "Delete it.", {}) if stages_file.exists() else {}
    found = {name: seconds_of(mask_set) for name, mask_set in masks.items()}
    seconds = {name: taken for name, taken in found.items() if taken is not None}
    return {
        "protocol": text.facts,
        "seconds": {**stages, **seconds},
        "density": {DENSE: 1.0} | {name: each.pattern.density for name, each in masks.items()},
        "mask_bytes": {name: each.size for name, each in masks.items() if each.path.is_file()},
    }
