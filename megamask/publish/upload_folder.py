"""The folder that is uploaded: mask or masked model, card, results, recipe and checksums."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megamask import __version__
from megamask.config import RunPaths
from megamask.config.yaml_text import write_yaml
from megamask.errors import ArtifactError
from megamask.export.folded import fold
from megamask.export.masked_folder import check_export
from megamask.file_kinds import read_text
from megamask.masks.file import MaskSet
from megamask.publish.base_facts import BaseFacts
from megamask.publish.card import MASK_FILE, SUMS, CardFacts, card
from megamask.publish.measured import measured, without_places
from megamask.report.reading import mask_provenance
from megamask.storage import atomic_dir, file_sha256, read_object, real_path, write_json
from megamask.weights.base_model import BaseModel
from megamask.weights.file_layout import file_layout
from megamask.weights.hf_files import write_hf
from megamask.weights.licences import copy_licences
from megamask.weights.own_folder import own_files
from megamask.weights.source import WeightSource

STAMP = "megamask_push.json"
CARD, RECIPE, VERSIONS = "README.md", "recipe.yaml", "versions.json"
SEEDS = ("seed", "calibration.seed")
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
    ) -> Publication:
        """With the results and the recipe of the run.

        Raises:
            ArtifactError: a file of results belongs to another mask, or is damaged.
        """
        results = measured(paths, masks)
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

    def finish(folder: Path) -> None:
        if one.is_model:
            check_export(folder, one.masks, one.base.ignore_keys)
        else:
            shutil.copyfile(one.masks.path, folder / MASK_FILE)
        _add_texts(folder, one)

    if one.is_model:
        tensors = ((name, fold(name, source.tensor(name), one.masks)) for name in source.names())
        layout = file_layout(one.base.architecture())
        write_hf(out, tensors, one.base.hf_dir, finish=finish, layout=layout)
        return
    with atomic_dir(out) as folder:
        finish(folder)


def uploaded_files(folder: Path) -> list[Path]:
    """The files of a written folder, by name."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _add_texts(folder: Path, one: Publication) -> None:
    """Add licences, results, recipe, versions, card and checksums."""
    licences = copy_licences(one.base.hf_dir, folder)
    for name, content in one.results.items():
        write_json(folder / name, content)
    provenance = mask_provenance(one.masks.path)
    if one.recipe:
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
    mask is not the learned mask of this run.

    Raises:
        ArtifactError: the settings cannot be read.
    """
    path, data = paths.learn / "config.yaml", masks.meta.get("data")
    learned = real_path(masks.path) == real_path(paths.mask("learned"))
    if not learned or not path.exists() or not isinstance(data, dict):
        return {}
    try:
        found = yaml.safe_load(read_text(path, "Run the verb learn again."))
    except (yaml.YAMLError, RecursionError) as error:
        problem = f"cannot be read as YAML ({type(error).__name__})"
        raise ArtifactError(path, problem, "Run the verb learn again.") from error
    if not isinstance(found, dict) or not _is_of(found, data):
        return {}
    shown: dict[str, Any] = without_places(found)
    shown.pop("launch", None)  # accounts and partitions of a cluster
    return shown


def _is_of(settings: dict[str, Any], data: dict[str, Any]) -> bool:
    """Whether a mask whose header holds ``data`` can come from a run with these settings."""
    facts = (_setting(settings, "learn.method"), _setting(settings, "data.seq_length"))
    if facts != (data.get("method"), data.get("seq_length")):
        return False
    sizes = [_setting(settings, key) for key in ("learn.steps", "learn.global_batch")]
    tokens, length = data.get("tokens"), facts[1]
    if not all(isinstance(one, int) and one > 0 for one in (*sizes, tokens, length)):
        return True  # a size that the settings leave open
    steps, batch = sizes
    return bool(tokens % (batch * length) == 0 and tokens <= steps * batch * length)


def _setting(settings: Any, key: str) -> Any:
    """The value of a dotted key; None where there is none."""
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings
