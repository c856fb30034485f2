"""What the verb tasks refuses of ``tasks.folder``, before a task or a model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamask.config import load_config
from megamask.errors import ArtifactError, ConfigError
from megamask.verbs import tasks
from tests.unit.export.test_masked_folder import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    save_model(folder)
    return folder


@pytest.fixture(autouse=True)
def harness_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness is looked for first, and needed later than every refusal here."""
    monkeypatch.setattr(tasks, "find_spec", lambda name: name)


def score(hf: Path, folder: Path, run_dir: Path) -> None:
    words = [f"run_dir={run_dir}", f"model.hf={hf}", f"tasks.folder={folder}", "device=cpu"]
    tasks.run(load_config(None, words))


def test_a_folder_that_is_called_as_the_dense_row_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(copytree(model, tmp_path / "dense"))
    (folder / "inner").mkdir()
    monkeypatch.chdir(folder / "inner")
    for path in (folder, Path("..")):
        with pytest.raises(ConfigError, match=r"tasks\.folder.*dense is the row of model\.hf"):
            score(model, path, tmp_path / "run")


def lacking(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_another(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"model.more": torch.ones(2)},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lacking, "misses tensors: model.norm.weight"),
        (with_another, "has unknown tensors: model.more"),
        (without_weights, "model.safetensors"),
    ],
)
def test_both_folders_must_hold_the_tensors_of_their_config(
    change: Callable[[Path], None], says: str, model: Path, tmp_path: Path
) -> None:
    broken = Path(copytree(model, tmp_path / "broken"))
    change(broken)
    for hf, folder in ((model, broken), (broken, model)):
        with pytest.raises(ArtifactError, match=f"broken.*{says}"):
            score(hf, folder, tmp_path / "run")
    assert not (tmp_path / "run" / "tasks.json").exists()
