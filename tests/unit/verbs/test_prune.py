"""The verb prune on one process: what it writes, what it reuses, what it refuses. Calibration
tokens are random here.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from megamask.config import Config, load_config, run_paths
from megamask.errors import ArtifactError, ConfigError
from megamask.masks.file import load_masks, save_masks
from megamask.masks.find import own_weights
from megamask.masks.identity import row_name
from megamask.masks.times import seconds_of
from megamask.prepare.run_inputs import RunInputs
from megamask.safe_checkpoint import NOTE
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.pattern_plan import PatternPlan
from megamask.storage import read_json
from megamask.verbs import convert, prune
from tests.parity.megatron import hf_tensors
from tests.unit.test_machine_errors import as_nobody, in_child

VOCAB = 40


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, num_key_value_heads=1, initializer_range=0.1, dtype=torch.bfloat16)
    ).bfloat16()
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def run_dir(hf: Path, tmp_path: Path) -> Path:
    convert.run(configured(tmp_path, hf))
    return tmp_path


def configured(run_dir: Path, hf: Path, *overrides: str) -> Config:
    methods = "prune.methods=[magnitude, wanda, sparsegpt, sparsegpt_update]"
    return load_config(
        None,
        [
            f"run_dir={run_dir}",
            f"model.hf={hf}",
            "device=cpu",
            "dtype=fp32",
            "calibration.samples=8",
            methods,
            *overrides,
        ],
    )


@pytest.fixture(autouse=True)
def random_calibration(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for text, of which other tests take care; returns a list that gets an entry per
    draw.
    """
    draws: list[str] = []

    def tokens(config: Config) -> torch.Tensor:
        draws.append("drawn")
        return torch.randint(
            VOCAB,
            (config.calibration.samples, 16),
            generator=torch.Generator().manual_seed(config.calibration.seed),
        )

    def description(config: Config) -> dict[str, Any]:
        return {"samples": config.calibration.samples, "seed": config.calibration.seed}

    monkeypatch.setattr(prune, "calibration_tokens", tokens)
    monkeypatch.setattr(prune, "calibration_description", description)
    return draws


def stamps(run_dir: Path) -> dict[str, int]:
    files = (run_dir / "masks").iterdir()
    return {path.name.partition(".")[0]: path.stat().st_mtime_ns for path in sorted(files)}


def test_magnitudes_of_another_dtype_are_another_mask(run_dir: Path, hf: Path) -> None:
    """They are those of the weights in the dtype that the model is computed in."""
    only = ("prune.methods=[magnitude]",)
    prune.run(configured(run_dir, hf, *only))
    before = stamps(run_dir)
    prune.run(configured(run_dir, hf, *only))
    assert stamps(run_dir) == before
    other = {"bf16": "fp32", "fp32": "bf16"}[configured(run_dir, hf).dtype]
    prune.run(configured(run_dir, hf, *only, f"dtype={other}"))
    assert stamps(run_dir) != before


@pytest.mark.parametrize("change", ["pattern=4:8", "model.exclude=['*.down_proj']"])
def test_weights_of_other_groups_or_linears_do_not_belong_to_a_mask(
    run_dir: Path, hf: Path, change: str
) -> None:
    """A mask that was set aside, or stayed behind when a run ended between weights and masks."""
    words = ("prune.methods=[sparsegpt_update]", "prune.inputs=dense")
    before, after = configured(run_dir, hf, *words), configured(run_dir, hf, *words, change)
    prune.run(before)
    paths, method = run_paths(before), "sparsegpt_update"
    old = Path(shutil.copy(paths.mask(method), paths.run_dir / "old.safetensors"))
    assert own_weights(load_masks(old), paths) == paths.updated_weights(method)
    prune.run(after)
    assert own_weights(load_masks(paths.mask(method)), paths) == paths.updated_weights(method)
    with pytest.raises(ArtifactError, match="does not belong to the mask"):
        own_weights(load_masks(old), paths)


@pytest.mark.parametrize("method", ["gblm", "pruner_zero"])
def test_a_gradient_needs_a_token_that_is_predicted(run_dir: Path, hf: Path, method: str) -> None:
    with pytest.raises(ConfigError, match="calibration.seq_length = 1: at least 2"):
        prune.run(configured(run_dir, hf, f"prune.methods=[{method}]", "calibration.seq_length=1"))


def test_writes_masks_and_updated_weights(run_dir: Path, hf: Path) -> None:
    config = configured(run_dir, hf)
    prune.run(config)
    dense, paths = load_file(hf / "model.safetensors"), run_paths(config)
    for method in config.prune.methods:
        masks = load_masks(paths.mask(method))
        masks.verify()
        masks.check(
            plan=PatternPlan.uniform([*masks], Pattern(2, 4)),
            shapes={name.removesuffix(".weight"): tuple(one.shape) for name, one in dense.items()},
        )
        assert len(masks) == 14 and masks.method == method
        seconds = seconds_of(masks)
        assert seconds is not None and seconds >= 0  # 0.00 s is a time too
        assert ("calibration" in masks.meta["data"]) == (method != "magnitude")
    magnitude = load_masks(paths.mask("magnitude"))
    assert all(
        torch.equal(mask, Pattern(2, 4).best(dense[f"{name}.weight"].abs()))
        for name, mask in magnitude.items()
    )

    updated_folder, updated_masks = (
        paths.updated_weights("sparsegpt_update"),
        load_masks(paths.mask("sparsegpt_update")),
    )
    note = read_json(updated_folder / NOTE, "")
    assert (
        note["fingerprint"] == updated_masks.fingerprint and note["dtype"] == "bfloat16"
    )  # as stored, not as computed
    updated = hf_tensors(updated_folder)
    assert set(updated) == set(dense)
    for name, weight in updated.items():
        assert weight.dtype == torch.bfloat16
        if (module := name.removesuffix(".weight")) in updated_masks:
            assert not weight[~updated_masks[module]].any() and not torch.equal(weight, dense[name])
        else:
            assert torch.equal(weight, dense[name])  # every bit


def test_reuses_what_fits_and_redoes_the_rest(
    run_dir: Path, hf: Path, random_calibration: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="megamask")
    prune.run(configured(run_dir, hf))
    first = stamps(run_dir)
    prune.run(configured(run_dir, hf))
    assert stamps(run_dir) == first and len(random_calibration) == 1
    assert caplog.text.count("reused") == 4

    def changed(*overrides: str) -> set[str]:
        before = stamps(run_dir)
        prune.run(configured(run_dir, hf, *overrides))
        return {method for method, stamp in stamps(run_dir).items() if stamp != before[method]}

    assert changed("prune.damp=0.02") == {"sparsegpt", "sparsegpt_update"}
    assert changed("prune.damp=0.02", "calibration.seed=1") == {
        "wanda",
        "sparsegpt",
        "sparsegpt_update",
    }
    assert (
        changed("prune.damp=0.02", "calibration.seed=1", "calibration.micro_batch=2") == set()
    )  # another way to the same masks
    last: Sequence[str] = (
        "prune.damp=0.02",
        "calibration.seed=1",
        "model.exclude=[model.layers.0.mlp.down_proj]",
    )
    assert changed(*last) == set(first)
    (run_dir / "masks" / "wanda.safetensors").write_bytes(b"torn")
    (run_dir / "weights-sparsegpt_update" / NOTE).unlink()
    assert changed(*last) == {"wanda", "sparsegpt_update"}


def test_dense_inputs_feed_all_methods_in_one_pass(
    run_dir: Path, hf: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="megamask")
    own, methods = configured(run_dir, hf), "wanda, sparsegpt, sparsegpt_update"
    shared = configured(run_dir, hf, "prune.inputs=dense")
    prune.run(shared)
    assert f"{methods}: 2:4 of 8 linears" in caplog.text and caplog.text.count("layer 2/2") == 1
    first = stamps(run_dir)
    masks = {method: load_masks(run_paths(own).mask(method)) for method in own.prune.methods}
    digests = {method: one.content_sha256 for method, one in masks.items()}
    assert masks["sparsegpt"].meta["data"]["inputs"] == "dense"
    assert row_name("sparsegpt", masks["sparsegpt"].meta) == "sparsegpt, dense inputs"
    assert row_name("magnitude", masks["magnitude"].meta) == "magnitude"  # reads no inputs
    assert digests["sparsegpt"] == digests["sparsegpt_update"] != digests["wanda"]
    prune.run(own)  # other inputs, other masks: all but magnitude are made again
    assert caplog.text.count("made from other inputs: made again") == 3
    second = stamps(run_dir)
    assert {method for method in first if first[method] != second[method]} == {
        "wanda",
        "sparsegpt",
        "sparsegpt_update",
    }
    assert "inputs" not in load_masks(run_paths(own).mask("wanda")).meta["data"]
    assert load_masks(run_paths(own).mask("sparsegpt")).content_sha256 != digests["sparsegpt"]
    prune.run(shared)  # and back
    assert load_masks(run_paths(own).mask("wanda")).content_sha256 == digests["wanda"]


def test_gradient_criteria_share_a_sweep_and_any_mask_takes_a_polish(
    run_dir: Path,
    hf: Path,
    random_calibration: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real_sweep = vars(prune)["sweep"]

    def slow_sweep(*arguments: Any) -> Any:
        time.sleep(1)
        return real_sweep(*arguments)

    caplog.set_level(logging.INFO, logger="megamask")
    methods = "prune.methods=[magnitude, gblm, pruner_zero, admm_update]"
    with monkeypatch.context() as slowly:
        slowly.setattr(prune, "sweep", slow_sweep)
        prune.run(configured(run_dir, hf, methods))
    assert caplog.text.count("gradients of sample 8/8") == 1 and len(random_calibration) == 1
    paths = run_paths(configured(run_dir, hf))
    names = ("magnitude", "gblm", "pruner_zero", "admm_update")
    plain = {method: load_masks(paths.mask(method)) for method in names}
    data = {method: masks.meta["data"] for method, masks in plain.items()}
    assert data["gblm"]["alpha"] == 100 and "calibration" in data["pruner_zero"]
    digests = {method: masks.content_sha256 for method, masks in plain.items()}
    assert len(set(digests.values())) == 4
    # the sweep is a part of the time of the methods that read gradients, and of no other
    seconds = {method: seconds_of(masks) or 0 for method, masks in plain.items()}
    assert min(seconds["gblm"], seconds["pruner_zero"]) >= 1 > seconds["magnitude"]

    polished = configured(run_dir, hf, methods, "prune.polish=2")
    prune.run(polished)
    again = {method: load_masks(paths.mask(method)) for method in names}
    assert {method for method in names if again[method].content_sha256 == digests[method]} == {
        "admm_update"
    }
    assert again["magnitude"].meta["data"]["polish"] == 2
    header = again["magnitude"].meta
    assert row_name("magnitude", header) == "magnitude, polished"
    assert row_name("mine", header) == "mine"  # the user's word
    assert row_name("magnitude", plain["magnitude"].meta) == "magnitude"
    before = stamps(run_dir)
    prune.run(polished)
    assert stamps(run_dir) == before
    # A polished mask of before, whose margins were those of its criterion, is made again.
    of_before = {key: one for key, one in header["data"].items() if key != "margins"}
    known: dict[str, Any] = {"fingerprint": header["fingerprint"], "data": of_before}
    save_masks(
        paths.mask("magnitude"), dict(again["magnitude"]), "2:4", method="magnitude", **known
    )
    caplog.clear()
    prune.run(polished)
    assert "made from other margins: made again" in caplog.text
    assert load_masks(paths.mask("magnitude")).meta["data"] == header["data"]
    prune.run(configured(run_dir, hf, methods))  # a polished mask is not taken for a plain one
    assert {method: load_masks(paths.mask(method)).content_sha256 for method in names} == digests


def test_magnitude_needs_no_text(run_dir: Path, hf: Path, random_calibration: list[str]) -> None:
    prune.run(configured(run_dir, hf, "prune.methods=[magnitude]"))
    assert not random_calibration
    assert set(stamps(run_dir)) == {"magnitude"}


def test_raised_damping_is_recorded_and_named(
    run_dir: Path, hf: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prune.run(
        configured(
            run_dir, hf, "prune.methods=[sparsegpt]", "prune.damp=1e-12", "calibration.samples=1"
        )
    )
    raised = load_masks(run_dir / "masks" / "sparsegpt.safetensors").meta["data"]["raised_damp"]
    assert raised["model.layers.0.mlp.down_proj"] > 1e-12  # 16 tokens for 48 features
    assert "model.layers.0.mlp.down_proj: prune.damp=1e-12 is too little" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prune.block=30"], r"prune\.block = 30.*multiple of M"),
        (
            ["pattern=1:32"],
            r"M must divide in_features of model\.layers\.0\.mlp\.down_proj, here 48"
            r".*model\.exclude",
        ),
        (["model.include=[nothing*]"], r"model\.include"),
        (["parallel.tp=2"], r"parallel\.tp"),
    ],
)
def test_refuses_settings_before_calibration(
    run_dir: Path, hf: Path, overrides: list[str], message: str, random_calibration: list[str]
) -> None:
    with pytest.raises(ConfigError, match=message):
        prune.run(configured(run_dir, hf, *overrides))
    assert not random_calibration


def test_refuses_weights_that_are_pruned_already(
    hf: Path, tmp_path: Path, random_calibration: list[str]
) -> None:
    weights = load_file(hf / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    weights[name] = weights[name] * Pattern(2, 4).best(weights[name].abs())
    sparse = tmp_path / "sparse"
    sparse.mkdir()
    (sparse / "config.json").write_bytes((hf / "config.json").read_bytes())
    save_file(weights, sparse / "model.safetensors", {"format": "pt"})
    config = configured(tmp_path / "run", sparse)
    convert.run(config)
    with pytest.raises(
        ArtifactError,
        match=r"model\.layers\.1\.self_attn\.o_proj is 2:4 sparse.*Convert the dense model",
    ):
        prune.run(config)
    with pytest.raises(ArtifactError, match=r"o_proj is 4:8 sparse"):  # weight by weight
        prune.run(configured(tmp_path / "run", sparse, "pattern=4:8:pair"))
    assert not random_calibration


def test_refuses_what_is_not_there(
    run_dir: Path, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ArtifactError, match="Run the verb convert"):
        prune.run(configured(run_dir / "empty", hf))
    monkeypatch.undo()  # the real description looks for shards
    with pytest.raises((ConfigError, ArtifactError), match=r"data\.domains|data\.blend|tokenizer"):
        prune.run(configured(run_dir, hf))


def test_refuses_an_output_that_cannot_be_written(run_dir: Path, hf: Path) -> None:
    (run_dir / "masks").write_text("a file in the way")
    with pytest.raises(ArtifactError, match=r"cannot be written.*run_dir"):
        prune.run(configured(run_dir, hf))


def test_no_method_is_refused(run_dir: Path, hf: Path) -> None:
    with pytest.raises(ConfigError, match=r"prune\.methods = \[\].*at least one method"):
        prune.run(configured(run_dir, hf, "prune.methods=[]"))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_run_folder_that_cannot_be_written(hf: Path) -> None:
    """Updated weights lie beside the masks, whose folder may be open alone, as behind a link."""

    def told(folder: str, method: str) -> str:
        config = configured(Path(folder), hf, f"prune.methods=[{method}]")
        return in_child(lambda: prune.check_early(RunInputs(config)), as_nobody)

    with tempfile.TemporaryDirectory(prefix="megamask-test-", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        (Path(folder) / "masks").mkdir()
        (Path(folder) / "masks").chmod(0o777)
        assert told(folder, "magnitude") == ""
        updated = told(folder, "sparsegpt_update")
    assert updated.startswith(f"{folder}: cannot be written (Permission denied)")
