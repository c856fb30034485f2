"""The facts of several run folders, for a comparison: what each run is, how far it came, and which
of its numbers belong to it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megamask.config import Config, RunPaths, run_paths
from megamask.config.load import load_config
from megamask.config.paths import LEARNED
from megamask.config.published import SETTINGS_SHA256, settings_digest
from megamask.config.yaml_text import read_yaml
from megamask.data.shards import read_shards
from megamask.data.split import HELDOUT, TRAIN
from megamask.errors import ArtifactError, MegamaskError, printable
from megamask.masks.file import MaskSet
from megamask.masks.find import open_masks
from megamask.report.domains_table import read_domains
from megamask.report.reading import RunData, read_run
from megamask.report.result_table import ResultTable
from megamask.report.results_table import methods_first
from megamask.report.tasks_table import TASKS, read_tasks_results
from megamask.report.tasks_table import TITLE as TASKS_TITLE
from megamask.storage import real_path
from megamask.weights.layer_plan import asked_patterns
from megamask.weights.model_identity import FINGERPRINT

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFacts:
    """A run.

    Attributes:
        name: the shortest end of its path that no other run has.
        state: how far its learning came; ``finished``, or ``no learning``.
        settings: those of its learning run, as its folder has them; None where there are none.
        data: what its folder holds.
        masks: method -> mask, of those that can be opened.
        model: the fingerprint of its base model; None where nothing tells.
        tasks: content of ``tasks.json``, or {}.
        text: domain -> digest of its held-out tokens, of those that are known.
    """

    name: str
    state: str
    settings: Config | None
    data: RunData
    masks: Mapping[str, MaskSet]
    model: str | None
    tasks: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, str] = field(default_factory=dict)

    @property
    def model_name(self) -> str:
        """The name of the base model, by the settings."""
        model = self.settings.model if self.settings else None
        place = model and (model.hf or model.gguf or model.megatron)
        return printable(Path(place).name, kept="") if place else "model of the run folder"

    @property
    def pattern(self) -> str:
        """N:M of the masks, the learned mask first, or of the settings."""
        patterns = {str(one.patterns): None for one in self.masks.values()}
        if LEARNED in self.masks:
            return str(self.masks[LEARNED].patterns)
        asked = map(str, asked_patterns(self.settings)) if self.settings else ["–"]
        return ", ".join(patterns or asked)


@dataclass
class Comparison:
    """Several runs.

    Attributes:
        runs: in the order in which they were given.
        tables: results that belong to no run, such as those of a study of domains.
        said: a sentence for each folder that was left out, is not finished, or holds numbers that
            do not belong together.
    """

    runs: list[RunFacts] = field(default_factory=list)
    tables: list[ResultTable] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


def read_runs(given: Sequence[str], state_of: Callable[[RunPaths], str]) -> Comparison:
    """Read run folders. What is no run folder, or cannot be read, is left out and named.

    Args:
        given: the folders; also a folder with a ``domains.json``, or such a file.
        state_of: the state of a learning run in words; empty where nothing was learned.
    """
    found, folders = Comparison(), dict[Path, str]()
    for text in given:
        place = real_path(Path(text))
        if place in folders:
            found.said.append(f"{text} is named twice, and shown once.")
        folders.setdefault(place, text)
    names = names_of(list(folders))
    for place, text in folders.items():
        try:
            _read(found, place, names[place], state_of)
        except MegamaskError as error:
            problem = error.problem if isinstance(error, ArtifactError) else str(error)
            where = error.path if isinstance(error, ArtifactError) else str(place)
            beside = "" if where == str(place) else f"{where} "
            found.said.append(f"{text} is left out: {beside}{problem}.")
        except OSError as error:
            found.said.append(f"{text} is left out: it cannot be read ({error.strerror}).")
    shared = Counter(place.name for place in folders)
    for name, count in shared.items():
        if count > 1:
            called = ", ".join(names[place] for place in folders if place.name == name)
            found.said.append(f"{count} folders are called {name}: they are shown as {called}.")
    found.said = [printable(one, kept="") for one in found.said]
    return found


def names_of(folders: Sequence[Path]) -> dict[Path, str]:
    """Absolute path -> the shortest end of it that no other path has."""
    names = {}
    for folder in folders:
        parts = [part for part in folder.parts if part != folder.anchor] or [str(folder)]
        for depth in range(1, len(parts) + 1):
            end = tuple(parts[-depth:])
            if sum(other.parts[-depth:] == end for other in folders) <= 1:
                break
        names[folder] = printable("/".join(end), kept="")
    return names


def _read(found: Comparison, place: Path, name: str, state_of: Callable[[RunPaths], str]) -> None:
    """Read a folder or a ``domains.json`` into ``found``.

    Raises:
        ArtifactError: it is something else, or damaged.
    """
    if place.suffix == ".json" and place.is_file():
        found.tables.append(_named(read_domains(place), name))
        return
    if not place.is_dir():
        problem = "is no run folder" if place.exists() else "is missing"
        raise ArtifactError(place, problem, "")
    run = _read_folder(place, name, state_of, found.said)
    others = [table for table in run.data.tables if table.title != TASKS_TITLE]
    found.tables += [_named(table, name) for table in others]
    data = run.data
    if data.train or data.evaluations or data.masks or data.by_protocol() or run.tasks:
        found.runs.append(run)


def _read_folder(
    place: Path, name: str, state_of: Callable[[RunPaths], str], said: list[str]
) -> RunFacts:
    """The facts of a folder; what does not belong together is said.

    Raises:
        ArtifactError: the folder is no run folder, or damaged.
    """
    settings = read_settings_of(place, said)
    config = (settings or Config()).model_copy(update={"run_dir": str(place)})
    data = read_run(config)
    masks = _masks(data, config, name, said)
    tasks_file = place / TASKS.file
    tasks = read_tasks_results(tasks_file) if tasks_file.exists() else {}
    state = state_of(run_paths(config))
    if not state:
        state = "finished" if LEARNED in masks else "not finished" if data.train else "no learning"
    if state not in ("finished", "no learning"):
        said.append(f"{name} is not finished: {state}. Its numbers are those of this step.")
    _say_other_settings(name, masks.get(LEARNED), place, said)

    tasks, left_out = data.own.rows_of(TASKS.file, "tasks", tasks, "tasks")
    said += [f"{name}: {one}" for one in [*data.said, *left_out]]
    return RunFacts(
        name=name,
        state=state,
        settings=settings,
        data=data,
        masks=masks,
        model=_model_of(data, masks),
        tasks=tasks,
        text=_text_of(place, masks),
    )


def read_settings_of(folder: Path, said: list[str] | None = None) -> Config | None:
    """The settings of the learning run in a folder; None where there are none, or none that this
    version reads, which is said.
    """
    path = folder / "learn" / "config.yaml"
    if not path.exists():
        return None
    try:
        return load_config(path)
    except MegamaskError as error:
        problem = f"{path} is left out: {error}"
        log.warning("%s", problem)
        if said is not None:
            said.append(problem)
        return None


def _masks(data: RunData, config: Config, name: str, said: list[str]) -> dict[str, MaskSet]:
    found = {}
    for method in methods_first(data.masks):
        try:
            found[method] = open_masks(str(data.masks[method]), config)
        except ArtifactError as error:
            said.append(f"{name}: the mask {method} is left out: it {error.problem}.")
    return found


def _model_of(data: RunData, masks: Mapping[str, MaskSet]) -> str | None:
    """The fingerprint of the base model: that of the learned mask, of all masks, of the weights."""
    if LEARNED in masks:
        return masks[LEARNED].fingerprint
    known = {one.fingerprint for one in masks.values()}
    return known.pop() if len(known) == 1 else data.own.model.get(FINGERPRINT)


def _text_of(place: Path, masks: Mapping[str, MaskSet]) -> dict[str, str]:
    """Domain -> digest of the held-out tokens. Shards whose training tokens are not those of the
    learned mask were made after it, and tell nothing of its text.
    """
    learned = text_of_mask(masks.get(LEARNED))
    found = {}
    for folder in sorted((place / "shards").glob("*/meta.json")):
        domain = folder.parent.name
        try:
            shards = read_shards(folder.parent)
            trained, heldout = (shards.content_sha256(split) for split in (TRAIN, HELDOUT))
        except (ArtifactError, KeyError):
            continue
        if learned.get(domain, trained) == trained:
            found[domain] = heldout
    return found


def text_of_mask(masks: MaskSet | None) -> dict[str, Any]:
    """Domain -> digest of the training tokens, as the header of a learned mask has them."""
    text = facts_of_mask(masks).get("text_sha256")
    return text if isinstance(text, dict) else {}


def facts_of_mask(masks: MaskSet | None) -> dict[str, Any]:
    """The facts ``data`` of the header of a mask."""
    found = None if masks is None else masks.meta.get("data")
    return found if isinstance(found, dict) else {}


def _say_other_settings(name: str, learned: MaskSet | None, place: Path, said: list[str]) -> None:
    """Say where the learned mask is of other settings than those beside it, which are written when
    a run starts.
    """
    digest, path = facts_of_mask(learned).get(SETTINGS_SHA256), place / "learn" / "config.yaml"
    if digest is None or not path.exists():
        return
    try:
        settings = read_yaml(path.read_bytes())
    except ValueError:
        settings = None
    if not isinstance(settings, dict) or settings_digest(settings) != digest:
        said.append(f"{name}: its learned mask is of other settings than learn/config.yaml.")


def _named(table: ResultTable, name: str) -> ResultTable:
    return replace(table, title=f"{table.title}: {name}", pictures=())
