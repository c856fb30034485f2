"""Rows that belong to masks, or to a model, that the run has no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megamask.config import Config
from megamask.masks.file import MaskSet, load_masks, save_masks
from megamask.masks.identity import identity, row_name
from megamask.report.own_rows import OwnMasks
from megamask.report.reading import _prior
from megamask.report.results_table import base_method, best_one_shot, method_label
from megamask.sparsity.pattern import Pattern
from megamask.weights.model_identity import MODEL


def mask(path: Path, seed: int, fingerprint: str = "a", **data: Any) -> MaskSet:
    pattern = Pattern(2, 4)
    scores = torch.rand(1, 8, generator=torch.Generator().manual_seed(seed))
    masks = {"a.proj": pattern.best(scores)}
    save_masks(path, masks, "2:4", fingerprint=fingerprint, method=path.stem, data=data)
    return load_masks(path)


def test_rows_of_a_mask_that_was_made_in_another_way_since(tmp_path: Path) -> None:
    path = tmp_path / "wanda.safetensors"
    polished = mask(path, 1, polish=20)
    name = row_name("wanda", polished.meta)
    results = {
        "perplexity": {"dense": {"code": 1.0}, name: {"code": 2.0}, "mine": {"code": 3.0}},
        "masks": {name: identity(polished), "mine": identity(polished)},
    }
    known = OwnMasks({name: polished}, {"fingerprint": "a"})
    assert known.strange_rows(results, "perplexity") == {}
    plain = mask(path, 2)
    now = OwnMasks({row_name("wanda", plain.meta): plain}, {"fingerprint": "a"})
    assert now.strange_rows(results, "perplexity") == {name: "was measured on another mask"}


def test_rows_of_another_model(tmp_path: Path) -> None:
    found = mask(tmp_path / "wanda.safetensors", 1)
    results = {
        "perplexity": {"dense": {"code": 1.0}, "mine": {"code": 3.0}, "old": {"code": 4.0}},
        "masks": {"mine": identity(found)},
    }
    strange = OwnMasks({}, {"fingerprint": "b"}).strange_rows(results, "perplexity")
    assert strange == dict.fromkeys(("dense", "mine"), "was measured on another model")


def test_a_mask_of_a_copy_in_another_dtype_is_of_the_model(tmp_path: Path) -> None:
    """Its header names the fingerprint of the other copy; the digest of the model decides."""
    found = mask(tmp_path / "wanda.safetensors", 1)
    results = {
        "perplexity": {"dense": {"code": 1.0}, "mine": {"code": 3.0}},
        "masks": {"mine": identity(found)},
        MODEL: "digest",
    }
    model = {"fingerprint": "fp16", MODEL: "digest"}
    assert OwnMasks({}, model).strange_rows(results, "perplexity") == {}
    other = OwnMasks({}, {**model, MODEL: "another"}).strange_rows(results, "perplexity")
    assert set(other) == {"dense", "mine"}


def test_a_prior_that_was_made_anew_since_is_not_the_prior(tmp_path: Path) -> None:
    config = Config.model_validate({"run_dir": str(tmp_path)})
    (tmp_path / "masks").mkdir()
    prior = mask(tmp_path / "masks/sparsegpt.safetensors", 1)
    learned = mask(tmp_path / "masks/learned.safetensors", 2, prior_sha256=prior.content_sha256)
    silent = mask(tmp_path / "masks/old.safetensors", 2)  # of an older version
    assert all(_prior(config, one) is not None for one in (learned, silent, None))
    mask(tmp_path / "masks/sparsegpt.safetensors", 3)
    assert _prior(config, learned) is None and _prior(config, silent) is not None


def test_names_of_rows() -> None:
    values = {"dense": 1.0, "admm": 9.0, "wanda, polished": 8.0, "sparsegpt": 30.0, "learned": 5.0}
    assert best_one_shot(values) == "wanda, polished"
    assert best_one_shot({"learned": 5.0, "admm_update": 3.0, "mine": 1.0}) is None
    assert method_label("wanda, polished, dense inputs") == "Wanda, polished, dense inputs"
    recovered = "wanda, recovered (wanda + lora)"
    assert base_method(recovered) == method_label(recovered) == recovered
