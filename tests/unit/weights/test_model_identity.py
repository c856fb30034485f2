"""What tells a model from all others: its linears, every other tensor, and the facts of its
config.json.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamask.weights import model_identity
from megamask.weights.base_model import BaseModel
from megamask.weights.family import Layer
from megamask.weights.model_identity import (
    ARCHITECTURE,
    FILES,
    MODEL,
    UNMASKED,
    architecture_facts,
    difference,
    identity_note,
    model_facts_of,
    recipe_differs,
)
from tests.unit.export.test_masked_folder import save_model

Tensors = dict[str, torch.Tensor]
Change = Callable[[Path], None]


def note_of(folder: Path) -> dict[str, Any]:
    base = BaseModel(folder)
    with base.open() as source:
        return identity_note(base, source)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("identity") / "hf"
    save_model(folder, tied=False)
    return folder


@pytest.fixture(scope="module")
def note(hf: Path) -> dict[str, Any]:
    return note_of(hf)


@pytest.fixture
def copy(hf: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(hf, tmp_path / "copy"))


def tensors(change: Callable[[Tensors], Tensors]) -> Change:
    def write(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return write


def config(**keys: Any) -> Change:
    def write(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))

    return write


def scaled(name: str) -> Change:
    return tensors(lambda found: {**found, name: found[name] * 2})


OTHER_ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
CHANGES: dict[str, tuple[Change, str]] = {
    "embedding": (scaled("model.embed_tokens.weight"), "other norms, embedding"),
    "last norm": (scaled("model.norm.weight"), "other norms, embedding"),
    "head": (
        tensors(lambda found: {**found, "lm_head.weight": found["lm_head.weight"].flip(0)}),
        "other norms, embedding",
    ),
    "linear": (scaled("model.layers.0.mlp.up_proj.weight"), "other weights"),
    "eps": (config(rms_norm_eps=0.1), r"another config.json \(norm\)"),
    "rotation": (config(rope_parameters=OTHER_ROPE), r"another config.json \(ropes\)"),
    "tied": (config(tie_word_embeddings=True), r"another config.json \(tied\)"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_of_the_function_is_another_model(
    hf: Path, note: dict[str, Any], copy: Path, name: str
) -> None:
    change, words = CHANGES[name]
    change(copy)
    assert re.search(words, difference(note, BaseModel(copy)))
    if name == "tied":
        return  # the files have a head of their own, and are refused before
    assert model_facts_of(note_of(copy)) != model_facts_of(note)
    if name != "linear":  # the fingerprint alone does not tell
        assert BaseModel(copy).fingerprints() == BaseModel(hf).fingerprints()


def test_a_copy_in_another_place_or_dtype_is_the_same_model(
    note: dict[str, Any], copy: Path
) -> None:
    assert difference(note, BaseModel(copy)) == ""
    config(dtype="float32", _name_or_path="elsewhere")(copy)
    tensors(lambda found: {name: one.float() for name, one in found.items()})(copy)
    assert difference(note, BaseModel(copy)) == ""
    assert model_facts_of(note_of(copy)) == model_facts_of(note) != {}


def test_files_that_did_not_change_are_not_read(
    hf: Path, note: dict[str, Any], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[Path]()
    opened = BaseModel.open

    def counted(base: BaseModel) -> Any:
        read.append(base.place)
        return opened(base)

    monkeypatch.setattr(BaseModel, "open", counted)
    assert difference(note, BaseModel(hf)) == "" and read == []
    own = note_of(copy)
    os.utime(copy / "model.safetensors", ns=(1, 1))
    assert difference(own, BaseModel(copy)) == "" and read == [copy, copy]
    (copy / "model.safetensors").unlink()  # nothing is left that could be compared
    assert difference(own, BaseModel(copy)) == ""


def test_an_older_note_is_compared_by_what_it_has(note: dict[str, Any], copy: Path) -> None:
    old = {key: note[key] for key in note if key not in (UNMASKED, ARCHITECTURE, FILES)}
    CHANGES["last norm"][0](copy)
    assert difference(old, BaseModel(copy)) == "" and model_facts_of(old) == {}
    CHANGES["linear"][0](copy)
    assert "other weights" in difference(old, BaseModel(copy))
    for found, wanted, differs in (
        ({"a": 1}, {"a": 1, MODEL: "x"}, ""),
        ({"a": 1, MODEL: "x"}, {"a": 1}, ""),
        ({"a": 2}, {"a": 1, MODEL: "x"}, "a"),
        ({"a": 1, MODEL: "y"}, {"a": 1, MODEL: "x"}, MODEL),
    ):
        assert recipe_differs(found, wanted) == differs


def test_facts_leave_neutral_defaults_out(hf: Path) -> None:
    arch = BaseModel(hf).architecture()
    facts = architecture_facts(arch)
    assert "parallel_residual" not in facts and facts["layers"] == [{}]
    assert architecture_facts(replace(arch, layers=(Layer(),))) == facts
    assert architecture_facts(replace(arch, layers=(Layer(window=8),))) != facts
    assert model_identity.NO_FACTS == ("family", "dtype", "rounds_embedding_scale")
