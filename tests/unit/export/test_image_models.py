"""Models with an image tower beside the text part: files in both spellings, masks on the text part
alone, and everything else of an export bit for bit the model's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import megamask
from megamask.config import Config, load_config
from megamask.errors import ArtifactError, ConfigError
from megamask.export.masked_folder import check_others
from megamask.masks.file import MaskSet, load_masks, save_masks
from megamask.masks.foreign.importing import import_masks
from megamask.sparsity.pattern import Pattern
from megamask.verbs.diff import run as diff
from megamask.verbs.export import run as export
from megamask.verbs.extract import run as extract
from megamask.verbs.own_arguments import DiffArguments, ExtractArguments, ReorderArguments
from megamask.verbs.reorder import run as reorder
from megamask.weights.base_model import BaseModel
from megamask.weights.hf_files import open_checked
from megamask.weights.mapping import linear_shapes
from megamask.weights.model_identity import OTHERS, identity_note
from tests.image_models import answer, image_model, is_text, save_image_model, tensors

P24 = Pattern(2, 4)
TOWER = "vision_tower.encoder.layers.0.mlp.fc1.bias"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in both spellings, and the published spelling with a head of its own."""
    root = tmp_path_factory.mktemp("models")
    return {
        "published": save_image_model(root / "published"),
        "in memory": save_image_model(root / "memory", in_memory=True),
        "untied": save_image_model(root / "untied", tied=False),
        "untied in memory": save_image_model(root / "untied-memory", tied=False, in_memory=True),
    }


def settings(run_dir: Path, hf: Path, **changes: object) -> Config:
    chosen = {"run_dir": str(run_dir), "model.hf": str(hf), **changes}
    return load_config(None, [f"{key}={value}" for key, value in chosen.items()])


def mask_of(folder: Path, out: Path) -> MaskSet:
    """The mask of the largest weights, named and marked as the verbs do."""
    base = BaseModel(folder)
    with base.open() as source:
        masks = {
            name: P24.best(source.tensor(f"{name}.weight").abs())
            for name in linear_shapes(base.architecture())
        }
    save_masks(out, masks, P24, fingerprint=base.fingerprints().exact, method="learned")
    return load_masks(out)


def changed(folder: Path, out: Path, name: str, change: str) -> Path:
    """A copy of a folder with one tensor changed, left out or added."""
    shutil.copytree(folder, out)
    stored = tensors(out)
    if change == "other":
        stored[name] = stored[name] + 1e-3
    elif change == "dropped":
        del stored[name]
    else:
        stored[name] = torch.zeros(3)
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("name", ["published", "in memory", "untied", "untied in memory"])
def test_a_dense_export_is_the_model_bit_for_bit_and_sees_the_same_image(
    folders: dict[str, Path], name: str, tmp_path: Path
) -> None:
    folder, out = folders[name], tmp_path / "export"
    export(settings(tmp_path, folder, **{"export.mask": "dense"}))
    before, after = tensors(folder), tensors(out)
    assert list(before) == list(after)
    assert all(torch.equal(tensor, after[one]) for one, tensor in before.items())
    assert all(tensor.dtype == after[one].dtype for one, tensor in before.items())
    for file in ("config.json", "preprocessor_config.json", "processor_config.json"):
        assert (out / file).read_bytes() == (folder / file).read_bytes()
    if name == "published":
        assert torch.equal(answer(out), answer(folder))
        assert not torch.equal(answer(out), answer(folder, brightness=2.0))  # the image counts


def test_a_masked_export_prunes_the_text_part_alone(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """In both spellings, with one mask, whose names are those of the published files."""
    path = tmp_path / "masks" / "learned.safetensors"
    path.parent.mkdir()
    masks = mask_of(folders["published"], path)
    assert "language_model.model.layers.0.mlp.down_proj" in masks and len(masks) == 14
    model = image_model()
    megamask.apply_masks(model, path)
    applied = model.state_dict()
    for name, begin in (("published", "language_model.model."), ("in memory", "model.language_")):
        export(settings(tmp_path, folders[name]))
        before, after = tensors(folders[name]), tensors(tmp_path / "export")
        assert list(before) == list(after) and any(one.startswith(begin) for one in after)
        pruned = [one for one, tensor in before.items() if not torch.equal(tensor, after[one])]
        assert len(pruned) == len(masks) and all(is_text(one) for one in pruned)
    assert {**applied, "lm_head.weight": None}.keys() == {*after, "lm_head.weight"}
    assert all(torch.equal(tensor, applied[one]) for one, tensor in after.items())
    assert not torch.equal(answer(tmp_path / "export"), answer(folders["published"]))


def others(base: BaseModel) -> str:
    with base.open() as source:
        return str(identity_note(base, source)[OTHERS])


def test_both_spellings_are_one_model(folders: dict[str, Path], tmp_path: Path) -> None:
    one, two = BaseModel(folders["published"]), BaseModel(folders["in memory"])
    assert one.fingerprints() == two.fingerprints()
    assert others(one) == others(two)
    half = tmp_path / "half"
    shutil.copytree(folders["published"], half)
    stored = {name: tensor.bfloat16() for name, tensor in tensors(half).items()}
    save_file(stored, half / "model.safetensors")
    rounded = others(BaseModel(half))
    assert rounded != others(one)
    back = {name: tensor.float() for name, tensor in stored.items()}
    save_file(back, half / "model.safetensors")
    assert others(BaseModel(half)) == rounded


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (TOWER, "other", None),
        (TOWER, "dropped", None),
        ("vision_tower.extra", "added", None),
        ("multi_modal_projector.mm_soft_emb_norm.weight", "other", None),
        ("text_tower.layers.0.mlp.up_proj.weight", "added", "unknown tensors: text_tower"),
        ("model.layers.0.mlp.up_proj.weight", "added", "unknown tensors: model.layers"),
        ("model.vision_tower.extra", "added", "unknown tensors: model.vision_tower"),
        (
            "language_model.model.norm.weight",
            "dropped",
            "misses tensors: language_model.model.norm",
        ),
    ],
)
def test_other_tensors_than_the_models_are_noticed(
    folders: dict[str, Path], tmp_path: Path, name: str, change: str, words: str | None
) -> None:
    base = BaseModel(folders["published"])
    other = BaseModel(changed(folders["published"], tmp_path / "other", name, change))
    if words is not None:
        with pytest.raises(ArtifactError, match=words):
            other.open()
        return
    assert other.fingerprints() == base.fingerprints()
    assert others(other) != others(base)
    with base.open() as source:
        check_others(folders["published"], base, source)
        if change != "added":
            with pytest.raises(ArtifactError, match=name):
                check_others(other.hf_dir, base, source)
            with pytest.raises(ArtifactError, match=rf"another {name}|misses tensors: {name}"):
                import_masks(other.hf_dir, tmp_path / "mask.safetensors", base, "2:4", {})


def test_a_folder_of_the_text_part_alone_misses_the_rest(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["published"], tmp_path / "text")
    text = {name: tensor for name, tensor in tensors(tmp_path / "text").items() if is_text(name)}
    save_file(text, tmp_path / "text" / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"vision_tower\.\*, multi_modal_projector\.\*"):
        open_checked(tmp_path / "text")


def test_masks_come_back_from_an_exported_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    """The folders have different spellings."""
    path = tmp_path / "masks" / "learned.safetensors"
    path.parent.mkdir()
    masks = mask_of(folders["in memory"], path)
    export(settings(tmp_path, folders["in memory"]))
    import_masks(
        tmp_path / "export",
        tmp_path / "back.safetensors",
        BaseModel(folders["published"]),
        "2:4",
        {},
    )
    back = load_masks(tmp_path / "back.safetensors")
    assert back.content_sha256 == masks.content_sha256 and back.fingerprint == masks.fingerprint
    megamask.verify(tmp_path / "back.safetensors", folders["in memory"])


def test_masks_are_extracted_and_compared_with_files_of_either_spelling(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "masks").mkdir()
    masks = mask_of(folders["published"], tmp_path / "masks" / "learned.safetensors")
    random = {name: P24.best(torch.rand(masks.shape(name))) for name in masks}
    other = tmp_path / "masks" / "random.safetensors"
    save_masks(other, random, P24, fingerprint=masks.fingerprint, method="random")
    model, figures = image_model(), tmp_path / "figures.json"
    for spelling, coding in (
        ("in memory", "words"),
        ("published", "uniform"),
        ("published", "given-weights"),
        ("in memory", "given-weights"),
    ):
        out, config = tmp_path / "out.safetensors", settings(tmp_path, folders[spelling])
        extract(config, ExtractArguments(snapshot="learned", file=str(out), coding=coding))
        for given in (folders["published"], folders["in memory"], model):
            found = load_masks(out, model=given)
            assert list(found) == list(masks) and found.content_sha256 == masks.content_sha256
            assert all(torch.equal(found[name], mask) for name, mask in masks.items())
        diff(config, DiffArguments(a="random", b=str(out), json=str(figures)))
        told = json.loads(figures.read_text())
        assert list(told["layers"]) == ["0", "1"] and len(told["kinds"]) == len(masks) // 2
        differ = sum(int((random[name] ^ mask).sum()) for name, mask in masks.items())
        assert told["all"]["weights_differ"] == differ / told["all"]["weights"] > 0
        diff(config, DiffArguments(a="learned", b=str(out), json=str(figures)))
        assert json.loads(figures.read_text())["all"]["weights_differ"] == 0
        if coding == "given-weights":
            strange = settings(tmp_path, save_image_model(tmp_path / spelling, seed=1))
            with pytest.raises(ArtifactError, match="another base model"):
                diff(strange, DiffArguments(a="learned", b=str(out)))
        out.unlink()


def test_masks_find_the_text_part_of_a_model_in_memory(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "learned.safetensors"
    masks = mask_of(folders["published"], path)
    model = image_model()
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    switched = megamask.Masks(model, {"learned": path})
    switched.use("learned")
    inner = model.model.language_model
    for name in masks:
        weight = inner.get_submodule(name.removeprefix("language_model.model.")).weight
        assert torch.equal(weight != 0, masks[name])
    switched.use(None)
    assert all(torch.equal(tensor, dense[one]) for one, tensor in model.state_dict().items())
    megamask.apply_masks(inner, path)  # a part of the model
    with pytest.raises(ArtifactError, match="made for another base model"):
        megamask.apply_masks(image_model(seed=1), path)


def test_what_is_not_built_is_refused_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    words = "gemma3"
    with pytest.raises(ConfigError, match=rf"export\.format.*other parts than text.*{words}"):
        export(settings(tmp_path, folders["published"], **{"export.format": "megatron"}))
    with pytest.raises(ConfigError, match=rf"model\.hf.*other parts than text.*{words}"):
        reorder(settings(tmp_path, folders["published"]), ReorderArguments(out=str(tmp_path / "o")))
    with pytest.raises(ConfigError, match=rf"model\.megatron.*other parts than text.*{words}"):
        BaseModel(folders["published"], tmp_path).open()
