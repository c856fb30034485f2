"""The verb tasks: accuracy of the dense model and of every mask on tasks of
lm-evaluation-harness.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megamask import storage
from megamask.config import Config
from megamask.config.paths import DENSE
from megamask.data.bos import before_document
from megamask.data.tokenizer import TextTokenizer, load_tokenizer
from megamask.errors import ConfigError
from megamask.evaluate.loaded_model import LoadedModel
from megamask.evaluate.loglikelihood import Score, Scorer, megatron_score, transformers_score
from megamask.evaluate.rows import mask_digests, mask_patterns
from megamask.export.folded import Stamp, read_stamp
from megamask.masks.identity import row_name
from megamask.model.build import DTYPES
from megamask.model.settled_masks import all_settled
from megamask.parallel.mesh import Mesh, choose_device, start
from megamask.prepare.run_inputs import RunInputs
from megamask.process.place import this_place
from megamask.report.tasks_table import TASKS, tasks_table
from megamask.terminal import tell
from megamask.verbs.evaluate import find_masks
from megamask.weights.architecture import Architecture, read_architecture
from megamask.weights.base_model import BaseModel
from megamask.weights.hf_files import open_checked
from megamask.weights.model_identity import (
    ARCHITECTURE,
    FINGERPRINT,
    UNMASKED,
    identity_note,
    model_facts_of,
)

if TYPE_CHECKING:
    from megamask.evaluate.harness import LoadedTasks

log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Score the tasks, write ``tasks.json`` and ``tasks.md`` to the run folder, and print the
    table.

    Raises:
        MegamaskError: lm-eval is not installed; a task, its data, weights or masks are missing or
            do not fit; found before the model is loaded.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "tasks.names",
            config.tasks.names,
            "needs the package lm-eval, which is not installed",
            "Install it: pip install -c constraints.txt -e '.[eval]'.",
        )
    inputs = RunInputs(config)
    run_dir = inputs.paths.run_dir
    storage.require_writable(run_dir)
    results = _of_folder(inputs) if config.tasks.folder else _of_masks(inputs)
    if this_place().is_main:
        storage.write_json(run_dir / TASKS.file, results)
        text = tasks_table(results)
        storage.write_text(run_dir / "tasks.md", f"{text}\n")
        log.info("wrote %s", run_dir / TASKS.file)
        tell(text)


@dataclass(frozen=True)
class _Session:
    """What all rows share.

    Attributes:
        config: the settings.
        tasks: the tasks with their data.
        tokenizer: text to ids.
        begin: the ids that a text begins with.
        positions: the most tokens that the model reads.
    """

    config: Config
    tasks: LoadedTasks
    tokenizer: TextTokenizer
    begin: list[int]
    positions: int

    @classmethod
    def opened(cls, config: Config, arch: Architecture) -> _Session:
        """With the data of all tasks."""
        from megamask.evaluate.harness import load_tasks

        tokenizer = replace(load_tokenizer(config), model_vocab=arch.vocab)
        begin = before_document(config, tokenizer)
        return cls(config, load_tasks(config.tasks), tokenizer, begin, arch.max_positions)

    def row(
        self,
        name: str,
        weights: Path,
        score: Score,
        device: torch.device,
        mesh: Mesh | None = None,
    ) -> dict[str, dict[str, float]]:
        """Task -> metric -> value.

        Raises:
            ArtifactError: the outputs of the weights are not finite.
        """
        from megamask.evaluate.harness import HarnessModel

        section = self.config.parallel
        multiple = section.tp if section.sequence_parallel and mesh else 1
        longest = self.positions // multiple * multiple
        batch = self.config.evaluate.micro_batch
        scorer = Scorer(name, weights, score, device, longest, batch, multiple, mesh)
        begin = time.perf_counter()
        found = self.tasks.run(HarnessModel(scorer, self.tokenizer, self.begin))
        if mesh is None or mesh.is_main:
            log.info("%-18s %.1f s", name, time.perf_counter() - begin)
        return found

    def results(self, rows: dict[str, Any], program: str) -> dict[str, Any]:
        """The content of ``tasks.json``: the rows, the groups among their tasks, and how the tasks
        were measured.
        """
        protocol = {
            "harness": version("lm-eval"),
            "program": program,
            "dtype": self.config.dtype,
            "bos": "before each text" if self.begin else "none",
            "tokenizer": Path(self.tokenizer.name).name,
            "tokenizer_sha256": self.tokenizer.fingerprint,
            **self.tasks.facts(),
        }
        return {"tasks": rows, "groups": self.tasks.found["group_map"], "protocol": protocol}


def _of_masks(inputs: RunInputs) -> dict[str, Any]:
    """The rows of the converted model, dense first, and of its masks."""
    config = inputs.config
    masks = find_masks(inputs)
    inputs.layout.check_model(inputs.arch)
    session = _Session.opened(config, inputs.arch)
    with start(config) as mesh:
        digests = mask_digests(masks)
        facts = {"masks": list(masks), "digests": digests}
        facts |= {"weights": inputs.fingerprint, "tokenizer": session.tokenizer.fingerprint}
        mesh.require_same("inputs", {**facts, "tasks": session.tasks.facts()})
        model, found = LoadedModel(config, inputs.paths, inputs.arch, mesh), {}
        with all_settled(masks, inputs.paths.run_dir / "measuring", mesh) as held:
            for name, each in {DENSE: None, **held}.items():
                weights, score = model.use(each), megatron_score(model.model)
                found[name] = session.row(name, weights, score, mesh.device, mesh)
    results = session.results(found, "Megatron-Core")
    about = {"masks": digests, "pattern": mask_patterns(masks)}
    return {**results, **about, **model_facts_of(inputs.note)}


def _of_folder(inputs: RunInputs) -> dict[str, Any]:
    """The rows of the dense folder and of ``tasks.folder``, both in transformers."""
    from transformers import AutoModelForCausalLM

    config, folder = inputs.config, Path(str(inputs.config.tasks.folder))
    if this_place().world > 1:
        allowed = "one process: transformers runs the folder on one device"
        raise ConfigError("tasks.folder", str(folder), allowed, "Start it without torchrun.")
    _row_of(folder, read_stamp(folder))  # before any file is read
    for path in (inputs.paths.hf, folder):
        # transformers gives random weights to a tensor that a folder lacks.
        with open_checked(path, config.model.ignore_keys):
            pass
    stamp, digest = _compared(inputs, folder)
    name = _row_of(folder, stamp)
    session = _Session.opened(config, read_architecture(folder, config.model.ignore_keys))
    found, device = {}, choose_device(config.device)
    for row, path in {DENSE: inputs.paths.hf, name: folder}.items():
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[config.dtype])
        score: Any = transformers_score(model.eval().to(device))
        found[row] = session.row(row, path, score, device)
        model = score = None  # the next model needs its memory
    masks = {} if stamp.identity is None else {name: stamp.identity}
    return {**session.results(found, "transformers"), "masks": masks, **digest}


def _row_of(folder: Path, stamp: Stamp) -> str:
    """The name of the row of a folder.

    Raises:
        ConfigError: the name is that of the row of ``model.hf``.
    """
    name = storage.real_path(folder).name  # ``.`` and ``..`` have a name too
    if (row := row_name(name, stamp.header)) == DENSE:
        allowed = f"a folder with another name: {DENSE} is the row of model.hf"
        raise ConfigError("tasks.folder", str(folder), allowed, "Rename the folder.")
    return row


def _compared(inputs: RunInputs, folder: Path) -> tuple[Stamp, dict[str, str]]:
    """The stamp of ``tasks.folder``, empty where the folder is no longer the model that an export
    wrote, such as after a fine-tuning into the same folder; and the digest of ``model.hf``, under
    its key.

    Raises:
        ConfigError: the folder is an export of another model than ``model.hf``, whose row would
            stand beside it.
    """
    stamp, notes = read_stamp(folder), []
    for path in (inputs.paths.hf, folder):
        base = BaseModel(path, ignore_keys=inputs.config.model.ignore_keys)
        with base.open() as source:
            notes.append(identity_note(base, source))
    dense, here = notes
    if stamp.identity is None:
        return Stamp(), model_facts_of(dense)
    if stamp.identity.get(FINGERPRINT) != dense[FINGERPRINT]:
        allowed = f"an export of the model in model.hf, {inputs.paths.hf}"
        fix = "Set model.hf to the model that the folder was exported from."
        raise ConfigError("tasks.folder", str(folder), allowed, fix)
    is_same = here[FINGERPRINT] == stamp.written
    if not is_same or any(here.get(key) != dense.get(key) for key in (UNMASKED, ARCHITECTURE)):
        said = "%s was changed since the export, or is of an older version: its row has no mask"
        log.warning(said, folder)
        return Stamp(), model_facts_of(dense)
    return stamp, model_facts_of(dense)
