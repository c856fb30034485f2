"""The verb evaluate: held-out perplexity of the dense model and of every mask of the run, per
domain, with the protocol.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch

from megamask import storage
from megamask.config import Config, RunPaths
from megamask.masks.file import MaskSet
from megamask.masks.find import own_weights
from megamask.model.build import build_model, masked_linears
from megamask.model.checkpoint import load_weights
from megamask.model.mask_shards import fold_masks
from megamask.model.perplexity import perplexity
from megamask.parallel.mesh import Mesh
from megamask.weights.architecture import Architecture

log = logging.getLogger(__name__)
DENSE = "dense"


class Rows:
    """Computes the rows of the table on one model, whose weights are loaded again only where a
    method changed them.
    """

    def __init__(
        self,
        config: Config,
        paths: RunPaths,
        arch: Architecture,
        mesh: Mesh,
        windows: dict[str, torch.Tensor],
    ) -> None:
        self.config, self.paths, self.arch, self.mesh, self.windows = (
            config,
            paths,
            arch,
            mesh,
            windows,
        )
        self.model = build_model(config, arch, mesh).eval()
        self.linears = masked_linears(self.model)
        self.loaded: Path | None = None

    def dense(self) -> dict[str, float]:
        """The model as it is."""
        return self._row(DENSE, self.paths.weights, None)

    def masked(self, method: str, masks: MaskSet) -> dict[str, float]:
        """The model under ``masks``, with the weights that the method updated, if it did."""
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
        if self.mesh.is_main:
            values = "  ".join(f"{domain} {value:.2f}" for domain, value in row.items())
            log.info("%-18s %s  (%.1f s)", method, values, time.perf_counter() - begin)
        return row


def results(
    config: Config,
    paths: RunPaths,
    masks: dict[str, MaskSet],
    windows: dict[str, torch.Tensor],
    measured: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """What ``results.json`` holds."""
    stages = (
        storage.read_json(paths.run_dir / "stages.json", "")
        if (paths.run_dir / "stages.json").exists()
        else {}
    )
    seconds = {
        name: found.meta["data"]["seconds"]
        for name, found in masks.items()
        if "seconds" in (found.meta.get("data") or {})
    }
    return {
        "perplexity": measured,
        "protocol": protocol(config, windows),
        "seconds": {**stages, **seconds},
        "density": {DENSE: 1.0, **{name: found.pattern.density for name, found in masks.items()}},
        "mask_bytes": {name: found.size for name, found in masks.items() if found.path.is_file()},
    }


def protocol(config: Config, windows: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Everything a perplexity must be read with."""
    section = config.evaluate
    return {
        "window": section.window,
        "stride": section.window,
        "targets_per_window": section.window - 1,
        "tail": "dropped",
        "bos": "one at the start" if section.bos else "none",
        "dtype": config.dtype,
        "split": "held-out documents",
        "tokens": {domain: tokens.numel() for domain, tokens in windows.items()},
    }
