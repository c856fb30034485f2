"""One model in memory, whose weights and masks change from row to row of a table."""

from __future__ import annotations

from pathlib import Path

from megamask.config import Config, RunPaths
from megamask.masks.file import MaskSet
from megamask.masks.find import own_weights
from megamask.model.build import build_model, masked_linears
from megamask.model.checkpoint import load_weights
from megamask.model.mask_shards import fold_masks
from megamask.parallel.mesh import Mesh
from megamask.weights.architecture import Architecture


class LoadedModel:
    """A model that computes as the row of a table asks.

    The weights are loaded again only for masks that belong to updated weights.

    Args:
        config: the settings.
        paths: the paths of the run.
        arch: the architecture of the model.
        mesh: process groups and device of this rank.
    """

    def __init__(self, config: Config, paths: RunPaths, arch: Architecture, mesh: Mesh) -> None:
        self.paths, self.arch, self.mesh = paths, arch, mesh
        self.model = build_model(config, arch, mesh).eval()
        self.linears = masked_linears(self.model)
        self.loaded: Path | None = None

    def use(self, masks: MaskSet | None) -> Path:
        """Compute under ``masks``, on the weights that they belong to; None is the dense model.
        Returns the weights.
        """
        own = None if masks is None else own_weights(masks, self.paths)
        weights = own or self.paths.weights
        if weights != self.loaded:
            load_weights(self.model, weights)
            self.loaded = weights
            if masks is not None:
                own_weights(masks, self.paths)  # it may have been replaced before it was opened
        fold_masks(self.linears, masks, self.arch, self.mesh)
        return weights
