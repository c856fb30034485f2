"""The folder that is uploaded: mask or masked model, card, results, recipe and checksums."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from megamask import __version__
from megamask.config import RunPaths
from megamask.config.paths import results_file
from megamask.config.published import SETTINGS_SHA256, settings_digest, without_places
from megamask.config.tree import PUBLISHED
from megamask.config.yaml_text import read_yaml, write_yaml
from megamask.errors import ArtifactError
from megamask.export.masked_folder import write_masked
from megamask.file_kinds import read_text
from megamask.masks.file import MaskSet, load_masks
from megamask.publish.base_facts import BaseFacts
from megamask.publish.card import MASK_FILE, SUMS, CardFacts, card
from megamask.publish.measured import measured
from megamask.report.reading import mask_provenance
from megamask.report.tasks_table import TASKS
from megamask.storage import (
    atomic_dir,
    file_sha256,
    read_json,
    read_object,
    real_path,
    write_json,
)
from megamask.weights.base_model import BaseModel
from megamask.weights.hf_files import INDEX, SINGLE
from megamask.weights.licences import is_licence
from megamask.weights.own_folder import own_files
from megamask.weights.side_files import TOKENIZER
from megamask.weights.source import WeightSource

log = logging.getLogger(__name__)
STAMP = "megamask_push.json"
CARD, RECIPE, VERSIONS = "README.md", "recipe.yaml", "versions.json"
SEEDS = ("seed", "calibration.seed")
# What a push may write about a mask or as one; licences and the model's own texts stay.
WRITTEN = (
    *map(results_file, ("heldout", *PUBLISHED)),
    *(TASKS.file, RECIPE, VERSIONS, MASK_FILE, SINGLE, INDEX),
    f"model-{5 * '[0-9]'}-of-{5 * '[0-9]'}.safetensors",
)
# What goes along with the weights of a model.
OF_A_MODEL = (
    *("*.safetensors", "*.safetensors.index.json", "*config.json", "*.py", "*.md"),
    *TOKENIZER,
    *("*.jinja", "megamask_*.json"),
)
# Files and keys in which transformers wrote where a model came from.
NAMING, NAMES = ("config.json", "tokenizer_config.json"), ("_name_or_path", "name_or_path")
MACHINE = ("platform", "cpu")  # of versions.json, which say nothing of the mask


@dataclass(frozen=True)
class Publication:
    """What is published.

    Attributes:
        repo: ``OWNER/NAME`` of the repository.
        paths: of the run.
        base: the base model.
        about: facts of the base model for the card.
        masks: the mask, checked against the base model.
        is_model: whether the masked model is published, and not the mask alone.
        results: what was measured on the mask.
        recipe: the settings that the mask was learned with; empty where they are unknown.
    """

    repo: str
    paths: RunPaths
    base: BaseModel
    about: BaseFacts
    masks: MaskSet
    is_model: bool
    results: dict[str, dict[str, Any]]
    recipe: dict[str, Any]

    @classmethod
    def of(
        cls,
        repo: str,
        paths: RunPaths,
        base: BaseModel,
        about: BaseFacts,
        masks: MaskSet,
        is_model: bool,
        model: Mapping[str, str],
    ) -> Publication:
        """With the results and the recipe of the run. ``model`` has the digest of the base model,
        under its key.

        Raises:
            ArtifactError: a file of results belongs to another mask or model, or is damaged.
        """
        results = measured(paths, masks, model)
        return cls(repo, paths, base, about, masks, is_model, results, _recipe(paths, masks))


def build(out: Path, one: Publication, source: WeightSource) -> None:
    """Write the folder; an older folder is replaced when the new folder is complete.

    Args:
        out: the folder.
        one: what is published.
        source: the tensors of the base model, or the updated tensors that the mask belongs to.

    Raises:
        ArtifactError: a tensor does not fit, or the written model fails its check.
    """

    if one.is_model:
        write_masked(one.base, out, source, one.masks, lambda folder: _add_texts(folder, one))
        return
    with atomic_dir(out) as folder:
        _copy_mask(one.masks, folder / MASK_FILE)
        _add_texts(folder, one)


def _leave_out(folder: Path) -> None:
    """Delete what lay beside the base model and is no part of one, such as logs and states of a
    training run, and cut the place of the model on its author's machine out of its configs.
    """
    found = {path: path.relative_to(folder).as_posix() for path in uploaded_files(folder)}
    others = {
        path: name
        for path, name in found.items()
        if not is_licence(path.name) and not any(fnmatch(name, one) for one in OF_A_MODEL)
    }
    for path in others:
        path.unlink()
    if others:
        log.warning("not pushed, no part of a model: %s", ", ".join(others.values()))
    for path in sorted(found.keys() - others.keys()):
        if path.name in NAMING and isinstance(known := read_json(path, ""), dict):
            cut = {key: without_places(known[key]) for key in NAMES if key in known}
            if {**known, **cut} != known:
                write_json(path, {**known, **cut})


def uploaded_files(folder: Path) -> list[Path]:
    """The files of a written folder, by name."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _copy_mask(masks: MaskSet, file: Path) -> None:
    """Copy a mask file, and check that the copy is the mask that was compared with the model.

    Raises:
        ArtifactError: the file was replaced in the meantime, or the copy is torn.
    """
    shutil.copyfile(masks.path, file)
    copied = load_masks(file)
    copied.check_whole()
    if copied.meta != masks.meta or copied.content_sha256 != masks.content_sha256:
        raise ArtifactError(masks.path, "was replaced while it was copied", "Push again.")


def _add_texts(folder: Path, one: Publication) -> None:
    """Leave out what is no part of a model, and add licences, results, recipe, versions, card and
    checksums.
    """
    _leave_out(folder)
    licences = one.base.copy_licences(folder)
    for name, content in one.results.items():
        write_json(folder / name, content)
    about = mask_provenance(one.masks.path if one.is_model else folder / MASK_FILE)
    provenance: dict[str, str] = without_places(about)
    if not one.recipe:
        provenance["settings"] = "not known to be those of this mask, so no recipe is here"
    else:
        (folder / RECIPE).write_text(write_yaml(one.recipe), encoding="utf-8")
        provenance |= {f"setting {key}": str(_setting(one.recipe, key)) for key in SEEDS}
        versions = one.paths.learn / VERSIONS
        if versions.exists():
            found = read_object(versions, "Run the verb learn again.", {})
            found = {key: value for key, value in found.items() if key not in MACHINE}
            write_json(folder / VERSIONS, found)
            provenance |= {f"version {key}": str(value) for key, value in found.items()}
    facts = CardFacts(
        one.repo, one.about, one.masks, one.is_model, one.results, provenance, licences
    )
    (folder / CARD).write_text(card(facts), encoding="utf-8")
    names = [path.relative_to(folder).as_posix() for path in uploaded_files(folder)]
    sums = [f"{file_sha256(folder / name)}  {name}\n" for name in names]
    (folder / SUMS).write_text("".join(sums), encoding="utf-8")
    mask = {"content_sha256": one.masks.content_sha256, "fingerprint": one.masks.fingerprint}
    stamp = {"megamask": __version__, "repo": one.repo, "mask": mask, **own_files(folder)}
    write_json(folder / STAMP, stamp)


def _recipe(paths: RunPaths, masks: MaskSet) -> dict[str, Any]:
    """The settings of the learning run of a mask, without folders of this machine; {} where the
    mask is not the learned mask of this run. ``config.yaml`` is written when a run starts and the
    mask when it ends, so the digest in the mask's header tells whether they are of one run.

    Raises:
        ArtifactError: the settings cannot be read.
    """
    path, data = paths.learn / "config.yaml", masks.meta.get("data")
    learned = real_path(masks.path) == real_path(paths.mask("learned"))
    if not learned or not path.exists() or not isinstance(data, dict):
        return {}
    try:
        found = read_yaml(read_text(path, "Run the verb learn again."))
    except ValueError as error:
        problem = f"cannot be read as YAML ({type(error).__name__})"
        raise ArtifactError(path, problem, "Run the verb learn again.") from error
    if not isinstance(found, dict) or settings_digest(found) != data.get(SETTINGS_SHA256):
        return {}
    shown: dict[str, Any] = without_places(found)
    shown.pop("launch", None)  # accounts and partitions of a cluster
    return shown


def _setting(settings: Any, key: str) -> Any:
    """The value of a dotted key; None where there is none."""
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings
