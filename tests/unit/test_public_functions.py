"""The public functions answer an argument of any type with a result or one error of ours."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch

import megamask
from megamask.errors import ArgumentError, MegamaskError, described
from megamask.masks.file import load_masks
from megamask.sparsity.pattern import Pattern
from megamask.weights.fingerprint import fingerprint_model, model_linears
from tests.conftest import IS_NIGHTLY
from tests.unit.masks.test_apply import tiny_model

ROUNDS = 1500 if IS_NIGHTLY else 500


def masks() -> dict[str, torch.Tensor]:
    return {"model.layers.0.mlp.up_proj": Pattern(2, 4).best(torch.arange(64.0).view(4, 16))}


def odd_values(folder: Path) -> list[Any]:
    """Values of many types; none of them names a place outside ``folder``."""
    good = masks()["model.layers.0.mlp.up_proj"]
    (folder / "text").write_text("hello")
    return [
        *(None, True, False, 0, -1, 2.5, float("nan"), 10**5000, 1j, b"", b"2:4", "", "2:4", "4:2"),
        *("9" * 5000 + ":4", "\0", "\ud83d", "x" * 300, " ", [], [1], (), {}, set(), object()),
        *(int, len, Pattern(2, 4), Pattern(1, 2), np.zeros(3), np.float32(1), range(3), folder),
        *(str(folder), str(folder / "text"), folder / "text" / "x", PurePosixPath(folder / "new")),
        *(
            str(folder / "made"),
            good,
            good.int(),
            good.float(),
            good * 2,
            good.to_sparse(),
            good[0],
        ),
        *(good.to("meta"), good.bool()[:, :6], torch.zeros(0, 4), good.to(torch.complex64)),
        *({"a": good}, {"a": good, 3: good}, {"a": 1}, {"": good}, {"__metadata__": good}),
        *({"\ud83d": good}, {"a": good.numpy()}, {"a": good.float() * float("nan")}, [good]),
        *(torch.nn.Linear(4, 4), torch.nn.Linear, torch.nn.Identity(), {"x": {1: {}}}, {(1, 2): 3}),
    ]


def calls(folder: Path) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Each public function, with arguments that work."""
    model, other = tiny_model(), tiny_model()  # apply_masks prunes the first for good
    linears = model_linears(model)
    path = folder / "masks.safetensors"
    found = {name: Pattern(2, 4).best(one.weight.abs()) for name, one in linears.items()}
    known = {"fingerprint": fingerprint_model(model), "method": "magnitude"}
    megamask.save_masks(path, found, "2:4", **known)
    model.save_pretrained(folder / "hf")
    saved = {"path": folder / "made", "masks": masks(), "pattern": "2:4", **known}
    whole = {"data": None, "evaluation": None, "updated_weights": False, "coding": "uniform"}
    return {
        "save_masks": (
            megamask.save_masks,
            {**saved, **whole, "float16_fingerprints": (), "model": None, "seconds": 1.5},
        ),
        "load_masks": (megamask.load_masks, {"path": path, "model": folder / "hf"}),
        "apply_masks": (
            megamask.apply_masks,
            {"hf_model": model, "masks": path, "check_fingerprint": True},
        ),
        "swap": (
            megamask.swap,
            {"hf_model": other, "masks": path, "keep": "device", "check_fingerprint": True},
        ),
        "Masks": (
            megamask.Masks,
            {"hf_model": other, "masks": {"a": path}, "keep": "cpu", "check_fingerprint": True},
        ),
        "accelerate": (
            megamask.accelerate,
            {"hf_model": other, "table": None, "tokens": {1: 2}, "measure": True, "quiet": True},
        ),
        "verify": (megamask.verify, {"path": path, "hf_dir": folder / "hf", "ignore_keys": ()}),
    }


def test_every_public_function_survives_every_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # relative names stay in here
    functions = calls(tmp_path)
    assert set(functions) == set(megamask.__all__) - {"__version__"}
    values, choose = odd_values(tmp_path), random.Random(0)
    refused = 0
    plans = [
        (name, {argument: value})
        for name, (_, good) in functions.items()
        for argument in good
        for value in values
    ]
    for _ in range(ROUNDS):
        name = choose.choice(sorted(functions))
        good = functions[name][1]
        changed = choose.sample(sorted(good), choose.randint(1, len(good)))
        plans.append((name, {argument: choose.choice(values) for argument in changed}))
    for name, changes in plans:
        function, good = functions[name]
        assert set(inspect.signature(function).parameters) == set(good)
        try:
            function(**{**good, **changes})
        except MegamaskError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 2000, str(error)
        except Exception as error:
            told = {argument: described(value) for argument, value in changes.items()}
            raise AssertionError(f"{name}({told}): {error!r}") from error
    assert refused > len(plans) // 2


def test_patterns_and_paths_as_users_write_them(tmp_path: Path) -> None:
    for number, pattern in enumerate(("2:4", " 2 : 4 ", Pattern(2, 4))):
        for kind in (str, Path):
            path = tmp_path / f"{number}{kind.__name__}"
            megamask.save_masks(kind(path), masks(), pattern, fingerprint="f", method="mine")
            assert load_masks(kind(path)).pattern == Pattern(2, 4)
    fp = {"fingerprint": "f", "method": "mine"}
    for wrong, message in (
        ("2/4", "N:M"),
        ("4:2", "0 < N < M"),
        (2.4, "or Pattern"),
        (None, "2:4"),
    ):
        with pytest.raises(ArgumentError, match=f"save_masks: pattern is .*{message}"):
            megamask.save_masks(tmp_path / "x", masks(), wrong, **fp)
    with pytest.raises(
        TypeError, match=r"hf_model is '/models/x': a loaded model is needed.*from_"
    ):
        megamask.apply_masks("/models/x", tmp_path / "x")
    with pytest.raises(ValueError, match=r"path is 3: a path is needed, as text or pathlib\.Path"):
        megamask.load_masks(3)
