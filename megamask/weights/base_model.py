"""The base model of a run: its config.json, and its weights in the format that they are in."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from megamask.config import Config, run_paths
from megamask.errors import ArtifactError
from megamask.weights.architecture import read_architecture
from megamask.weights.dist_checkpoint.checkpoint_folder import KEY, find_checkpoint
from megamask.weights.dist_checkpoint.megatron_args import disagreements
from megamask.weights.dist_checkpoint.megatron_reader import MegatronReader
from megamask.weights.family import Architecture
from megamask.weights.fingerprint import Fingerprints, fingerprints_of
from megamask.weights.hf_files import open_checked
from megamask.weights.source import WeightSource

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseModel:
    """Where a model lies.

    Attributes:
        hf_dir: Hugging Face folder with config.json and tokenizer, and with the weights where
            ``megatron`` is None.
        megatron: Megatron checkpoint with the weights.
        ignore_keys: see ``read_architecture``.
    """

    hf_dir: Path
    megatron: Path | None = None
    ignore_keys: Collection[str] = ()

    @property
    def place(self) -> Path:
        """The folder of the weights."""
        return self.megatron or self.hf_dir

    def architecture(self) -> Architecture:
        """The architecture of config.json.

        Raises:
            ArtifactError, ConfigError: see ``read_architecture``.
        """
        return read_architecture(self.hf_dir, self.ignore_keys)

    def open(self) -> WeightSource:
        """Open the weights and check them against config.json.

        Raises:
            ArtifactError: the files are incomplete, torn or of another model.
            ConfigError: config.json is of a model that is not supported, or there is no checkpoint.
        """
        if self.megatron is None:
            return open_checked(self.hf_dir, self.ignore_keys)
        fix = (
            f"{self.hf_dir / 'config.json'} must describe the model of the checkpoint: correct "
            f"model.hf or {KEY}."
        )
        folder = find_checkpoint(self.megatron)
        for name, there, here in disagreements(folder, self.architecture()):
            if f"megatron.{name}" not in self.ignore_keys:
                problem = f"was trained with {name} = {there!r}; config.json says {here!r}"
                way = f"If config.json is right, set model.ignore_keys=[megatron.{name}]."
                raise ArtifactError(folder, problem, f"{fix} {way}")
        found = MegatronReader(folder, self.architecture(), fix)
        if found.padding:
            what = "%s: %d rows beyond the vocabulary of config.json are left out"
            log.info(what, folder, found.padding)
        return found

    def of_weights(self, folder: Path, fix: str) -> WeightSource:
        """Open Megatron weights of this model: those that a verb wrote, or those of a checkpoint.

        Args:
            folder: the folder with the index.
            fix: what the user can do if they are torn or of another model.

        Raises:
            ArtifactError: they are torn or of another model.
        """
        return MegatronReader(folder, self.architecture(), fix)

    def fingerprints(self) -> Fingerprints:
        """The fingerprints of the weights.

        Raises:
            ArtifactError, ConfigError: see ``open``.
        """
        with self.open() as source:
            return fingerprints_of(source, self.architecture())


def base_model(config: Config) -> BaseModel:
    """The base model that ``model.hf`` and ``model.megatron`` name."""
    megatron = Path(config.model.megatron) if config.model.megatron else None
    return BaseModel(run_paths(config).hf, megatron, config.model.ignore_keys)
