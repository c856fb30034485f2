"""Numbers that are not finite are named by the verb that meets them first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.program import here, in_process, refusal

NAME = "model.layers.1.mlp.up_proj.weight"


def change(folder: Path, value: float) -> None:
    """Put ``value`` into one weight of a Hugging Face folder."""
    tensors = load_file(folder / "model.safetensors")
    tensors[NAME][3, 5] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_convert_names_the_tensor(
    model: Path, settings: Callable[[Path], list[str]], tmp_path: Path, value: float
) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "hf"))
    change(copy, value)
    done = in_process("convert", *settings(tmp_path / "run"), f"model.hf={copy}")
    assert "up_proj.weight holds 1 numbers that are not finite" in refusal(done)
    assert not (tmp_path / "run" / "weights").exists()


def test_convert_names_a_weight_that_its_dtype_cannot_hold(
    model: Path, settings: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "hf"))
    change(copy, 1e5)  # float16 ends at 65,504
    config = json.loads((copy / "config.json").read_text())
    config["dtype" if "dtype" in config else "torch_dtype"] = "float16"
    (copy / "config.json").write_text(json.dumps(config))
    done = in_process("convert", *settings(tmp_path / "run"), f"model.hf={copy}")
    assert "1 numbers that are too large for float16" in refusal(done)
    assert not (tmp_path / "run" / "weights").exists()


def test_export_refuses_a_model_that_is_not_finite(
    general: Path, model: Path, settings: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    copy, run_dir = Path(shutil.copytree(model, tmp_path / "hf")), tmp_path / "run"
    shutil.copytree(general, run_dir)
    change(copy, float("nan"))
    done = in_process("export", *settings(run_dir), f"model.hf={copy}")
    assert "is not finite" in refusal(done)
    assert not (run_dir / "export").exists()


def test_evaluate_says_that_the_model_is_not_finite(
    run_dir: Path, settings: Callable[[Path], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that were converted before convert looked at them: one of them is overwritten."""
    from megamask.evaluate import loaded_model
    from megamask.model.checkpoint import load_weights

    def load_and_break(model: torch.nn.Module, path: Path) -> None:
        load_weights(model, path)  # type: ignore[arg-type]
        with torch.no_grad():
            dict(model.named_parameters())["decoder.final_layernorm.weight"][0] = float("nan")

    monkeypatch.setattr(loaded_model, "load_weights", load_and_break)
    done = in_process("evaluate", *settings(run_dir))
    assert "outputs that are not finite on" in refusal(done)
    assert not (run_dir / "results.json").exists()


def test_recover_says_so_before_any_training_which_would_blame_the_rate(
    prepared: Path, model: Path, settings: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    """Weights that are finite, and whose products are not."""
    copy, run_dir = Path(shutil.copytree(model, tmp_path / "hf")), tmp_path / "run"
    shutil.copytree(prepared / "shards", run_dir / "shards")
    tensors = load_file(copy / "model.safetensors")
    tensors[NAME][3] = 3e38
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    words = [*settings(run_dir), f"model.hf={copy}", "model.exclude=[]"]
    for verb, *more in (("convert",), ("prune", "prune.methods=[magnitude]")):
        here(verb, *words, *more)
    finetune = ["recover.mask=magnitude", "recover.method=finetune", "recover.steps=1"]
    said = refusal(in_process("recover", *words, *finetune))
    assert "outputs that are not finite on" in said and "(row frozen)" in said
