"""The base model of a run: its config.json, and its weights in the format that they are in. A
Megatron checkpoint without a config.json beside it tells the architecture itself.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megamask.config import Config, run_paths
from megamask.errors import ArtifactError, ConfigError
from megamask.machine_errors import reading
from megamask.storage import file_sha256, read_object, write_json
from megamask.weights.architecture import parsed_architecture, read_architecture
from megamask.weights.dist_checkpoint.checkpoint_folder import KEY, RUN_CONFIG, find_checkpoint
from megamask.weights.dist_checkpoint.derived_config import derived_config
from megamask.weights.dist_checkpoint.megatron_args import disagreements, refuse_parts
from megamask.weights.dist_checkpoint.megatron_reader import MegatronReader
from megamask.weights.family import Architecture
from megamask.weights.file_layout import FileLayout, file_layout
from megamask.weights.fingerprint import Fingerprints, fingerprints_of
from megamask.weights.gguf_layout import GGUF_STAMP
from megamask.weights.hf_files import HFReader, open_checked
from megamask.weights.licences import copy_licences
from megamask.weights.other_tensors import WithOthers
from megamask.weights.side_files import add_tokenizer, side_digests, tokenizer_digests
from megamask.weights.source import WeightSource
from megamask.weights.token_ids import token_ids

CONFIG = "config.json"
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.index.json")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseModel:
    """Where a model lies.

    Attributes:
        hf_dir: Hugging Face folder with config.json and tokenizer, and with the weights where
            ``megatron`` is None. With ``megatron``, config.json or the folder may be missing.
        megatron: Megatron checkpoint with the weights.
        ignore_keys: see ``read_architecture``.
        gguf: GGUF file that ``hf_dir`` was unpacked from, where the settings name one.
        tokenizer: folder or file of the tokenizer, where the settings name one.
        adds_bos: whether the settings ask for a BOS before each document, which a sentencepiece
            file does not say.
    """

    hf_dir: Path
    megatron: Path | None = None
    ignore_keys: Collection[str] = ()
    gguf: Path | None = None
    tokenizer: Path | None = None
    adds_bos: bool = False

    @property
    def place(self) -> Path:
        """The folder of the weights."""
        return self.megatron or self.hf_dir

    @property
    def home(self) -> Path:
        """The folder that tells what the model is: ``hf_dir``, or where it is missing the folder of
        the weights.
        """
        return self.hf_dir if self.hf_dir.is_dir() else self.place

    def copy_licences(self, target: Path) -> list[str]:
        """Copy the licence files beside the weights and those of ``hf_dir``, which win, into folder
        ``target``; returns their names.
        """
        found = dict.fromkeys((self.place, self.hf_dir))
        return sorted({name for folder in found for name in copy_licences(folder, target)})

    def complete(self, folder: Path, name: str) -> None:
        """Give a written folder, which has the side files of ``hf_dir``, what they lack: the
        licences beside the weights, and where the model is a Megatron checkpoint the tokenizer that
        the settings name, and in a derived config.json the ids of its special tokens. The log says
        where there is no tokenizer.

        Args:
            folder: the folder.
            name: the name that it will have, for messages.
        """
        self.copy_licences(folder)
        if self.megatron is None:
            return
        if not add_tokenizer(folder, self.tokenizer, self.adds_bos):
            what = "%s has no tokenizer: set data.tokenizer, or copy one beside its config.json"
            log.warning(what, name)
        elif self.config is not None:
            try:
                ids = token_ids(folder)
            except Exception as error:  # whatever a tokenizer's library raises
                what = "%s: its tokenizer cannot be read, so config.json names no BOS and EOS: %s"
                log.warning(what, name, error)
            else:
                write_json(folder / CONFIG, {**self.config, **ids})

    def side_digests(self) -> dict[str, str]:
        """Name -> SHA-256 of the files beside the weights that a written folder gets, and of the
        tokenizer that ``complete`` may add.
        """
        found = side_digests(self.hf_dir, self.config)
        added = self.tokenizer if self.megatron is not None else None
        bos = {"added BOS": "true"} if added is not None and self.adds_bos else {}
        files = {f"added {name}": sha for name, sha in tokenizer_digests(added).items()}
        return found | bos | files

    def architecture(self) -> Architecture:
        """The architecture of config.json.

        Raises:
            ArtifactError, ConfigError: see ``read_architecture`` and ``derived_config``.
        """
        if self.config is None:
            return read_architecture(self.hf_dir, self.ignore_keys)
        return parsed_architecture(self.config, self.place, self.ignore_keys)

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The content of the config.json that ``hf_dir`` lacks; None where the folder has it.

        Raises:
            ArtifactError, ConfigError: see ``derived_config``; or there is no checkpoint.
        """
        if self.megatron is None or (self.hf_dir / CONFIG).exists():
            return None
        found = derived_config(find_checkpoint(self.megatron))
        log.info("%s: config.json is written from the checkpoint: %s", self.hf_dir, found)
        return found

    @contextmanager
    def config_file(self) -> Iterator[Path]:
        """A file with the content of config.json, within the block."""
        if self.config is None:
            yield self.hf_dir / CONFIG
            return
        with tempfile.TemporaryDirectory() as folder:
            write_json(Path(folder) / CONFIG, self.config)
            yield Path(folder) / CONFIG

    def open(self) -> WeightSource:
        """Open the weights and check them against config.json.

        Raises:
            ArtifactError: the files are incomplete, torn or of another model.
            ConfigError: config.json is of a model that is not supported, there is no checkpoint, or
                the folder was unpacked from another GGUF file.
        """
        if self.megatron is None:
            self.check_gguf()
            return open_checked(self.hf_dir, self.ignore_keys)
        fix = (
            f"{self.hf_dir / CONFIG} must describe the model of the checkpoint: correct "
            f"model.hf or {KEY}."
        )
        if self.config is not None:
            fix = f"Point model.hf at a folder with the config.json of the model, or correct {KEY}."
        hf = "Convert the checkpoint to a Hugging Face folder with Megatron's tools, and unset it."
        refuse_parts(self.architecture(), KEY, str(self.megatron), hf)
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

    def check_gguf(self) -> None:
        """Check that ``hf_dir`` was unpacked from ``gguf``, where both are known.

        Raises:
            ConfigError: it was unpacked from another file.
            ArtifactError: the stamp of the folder cannot be read.
        """
        if self._gguf_problem:
            fix = "Run the verb gguf, correct model.gguf, or leave it out."
            raise ConfigError("model.gguf", str(self.gguf), self._gguf_problem, fix)

    @cached_property
    def _gguf_problem(self) -> str:
        """Why the folder was not unpacked from the file. A file that is no longer there is compared
        by its name.
        """
        stamp = self.hf_dir / GGUF_STAMP
        if self.gguf is None or not stamp.is_file():
            return ""
        made = read_object(stamp, f"Remove {self.hf_dir}.", {"file": str, "sha256": str})
        if self.gguf.is_file():
            with reading(self.gguf, "Correct model.gguf."):
                is_same = file_sha256(self.gguf) == made["sha256"]
        else:
            is_same = self.gguf.name == made["file"]
        return "" if is_same else f"{self.hf_dir} was unpacked from another file ({made['file']})"

    def files(self) -> list[Path]:
        """The files that decide the model: config.json, those of the weights, and the GGUF file
        that they were unpacked from.

        Raises:
            ConfigError, ArtifactError: see ``find_checkpoint``.
        """
        gguf = [self.gguf] if self.gguf is not None and self.megatron is None else []
        found = [self.hf_dir / CONFIG, *self._weight_files(), *gguf]
        return [path for path in found if path.is_file()]

    def has_weights(self) -> bool:
        """Whether a file of weights is there. Raises as ``files``."""
        return any(self._weight_files())

    def _weight_files(self) -> list[Path]:
        if self.megatron is None:
            return sorted(one for kind in WEIGHT_FILES for one in self.hf_dir.glob(kind))
        folder = find_checkpoint(self.megatron)
        return [*sorted(folder.iterdir()), folder.parent / RUN_CONFIG]

    def layout(self) -> FileLayout:
        """How the files of the model hold its tensors. Raises as ``open``."""
        arch = self.architecture()
        if self.megatron is not None:
            return file_layout(arch)
        with HFReader(self.hf_dir, file_layout(arch)) as reader:
            return reader.layout

    def _others(self, source: WeightSource) -> list[str]:
        layout = file_layout(self.architecture())
        return [name for name in source.names() if layout.is_other(name)]

    def of_weights(self, folder: Path, fix: str) -> WeightSource:
        """Open Megatron weights of this model: those that a verb wrote, or those of a checkpoint.
        The tensors beside a text part are those of the model.

        Args:
            folder: the folder with the index.
            fix: what the user can do if they are torn or of another model.

        Raises:
            ArtifactError: they are torn or of another model.
        """
        text = MegatronReader(folder, self.architecture(), fix)
        if not file_layout(self.architecture()).others:
            return text
        whole = self.open()
        return WithOthers(text, whole, self._others(whole))

    def fingerprints(self) -> Fingerprints:
        """The fingerprints of the weights.

        Raises:
            ArtifactError, ConfigError: see ``open``.
        """
        with self.open() as source:
            return fingerprints_of(source, self.architecture())


def base_model(config: Config) -> BaseModel:
    """The base model that ``model.hf``, ``model.gguf`` and ``model.megatron`` name. Where
    ``model.hf`` is not set, a config.json beside the checkpoint counts, such as that of an export.
    """
    hf = run_paths(config).hf
    megatron = Path(config.model.megatron) if config.model.megatron else None
    if megatron is not None and config.model.hf is None and not (hf / CONFIG).exists():
        hf = megatron if (megatron / CONFIG).exists() else hf
    gguf = Path(config.model.gguf) if config.model.gguf else None
    tokenizer = Path(config.data.tokenizer) if config.data.tokenizer else None
    adds_bos = config.data.bos is True
    return BaseModel(hf, megatron, config.model.ignore_keys, gguf, tokenizer, adds_bos)
