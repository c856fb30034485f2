"""The verb recover: a model of its own beside the mask, its labels, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megamask import apply_masks
from megamask.config import run_paths
from megamask.config.load import load_config
from megamask.data.heldout import evaluation_windows
from megamask.errors import ArtifactError, LearningError
from megamask.masks.file import load_masks, save_masks
from megamask.masks.find import check_named_weights, own_weights
from megamask.masks.identity import OF_ANOTHER_RUN, recipe_of
from megamask.prepare.run_inputs import RunInputs
from megamask.recovery import blockwise, training
from megamask.recovery.recoveries import RECOVERIES
from megamask.safe_checkpoint import NOTE
from megamask.verbs.evaluate import find_masks
from megamask.weights.hf_files import HFReader
from megamask.weights.model_identity import recipe_differs
from tests.e2e.program import RECIPE, contents, here, in_process, refusal

pytestmark = pytest.mark.slow
Settings = Callable[[Path], list[str]]
NAME, LABEL = "wanda-reconstruct", "recovered (wanda + reconstruct)"
WORDS = (
    "dtype=fp32",
    "evaluate.max_tokens=512",
    "model.exclude=[]",
    "recover.method=reconstruct",
)


@pytest.fixture(scope="module")
def run_dir(prepared: Path, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a recovered model."""
    run_dir = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("recovered") / "run"))
    said = here("recover", *settings(run_dir), *WORDS, "recover.mask=wanda").stdout
    assert f"{NAME}: {LABEL}, no result of the frozen weights" in said
    return run_dir


def test_zeros_stay_and_the_rest_keeps_its_bits(run_dir: Path, model: Path) -> None:
    masks = load_masks(run_dir / "masks" / f"{NAME}.safetensors")
    frozen = load_masks(run_dir / "masks" / "wanda.safetensors")
    assert masks.content_sha256 == frozen.content_sha256 and masks.has_own_weights
    changed = set()
    with HFReader(run_dir / "recovered" / NAME) as new, HFReader(model) as old:
        assert set(new.names()) == set(old.names())
        for name in old.names():
            module, found, dense = name.removesuffix(".weight"), new.tensor(name), old.tensor(name)
            assert found.dtype == dense.dtype
            if module not in masks:
                assert torch.equal(found, dense), name
                continue
            pruned = found[~masks[module]]
            assert not pruned.any() and not torch.signbit(pruned).any()
            changed |= {module} if not torch.equal(found, dense * masks[module]) else set()
    assert changed == set(masks)
    errors = masks.meta["evaluation"]["output_error"]
    assert all(new < old for new, old in zip(errors["recovered"], errors["masked"], strict=True))
    stamp = json.loads((run_dir / "recovered" / NAME / "megamask_export.json").read_text())
    about = stamp["mask"]["data"]["recovered"]
    assert about["method"] == "reconstruct" and about["mask_sha256"] == frozen.content_sha256
    assert stamp["mask"]["fingerprint"] == frozen.fingerprint != about["weights"]
    assert about["settings"] == {"solver": "exact", "damp": 0.01}
    assert not list(run_dir.glob("recovering-*"))


def test_both_paths_measure_what_the_verb_reported(run_dir: Path, settings: Settings) -> None:
    told = load_masks(run_dir / "masks" / f"{NAME}.safetensors").meta["evaluation"]
    rows = "evaluate.masks={wanda: wanda, mine: wanda-reconstruct}"
    here("evaluate", *settings(run_dir), *WORDS, rows)
    results = json.loads((run_dir / "results.json").read_text())
    found = results["perplexity"]
    # A row that the user names says that it is recovered too.
    assert list(found) == ["dense", "wanda", f"mine, {LABEL}"]
    # fp64 sums of the same losses: of the windows that are compared by another way
    assert found["wanda"] == pytest.approx(told["frozen"], rel=1e-6)
    assert found[f"mine, {LABEL}"] == pytest.approx(told["perplexity"], rel=1e-6)
    assert told["perplexity"] != pytest.approx(told["frozen"], rel=1e-3)
    assert {"sha256", "fingerprint", "weights"} == set(results["masks"][f"mine, {LABEL}"])
    windows = evaluation_windows(load_config(RECIPE, [*settings(run_dir), *WORDS]), 512)
    loaded = AutoModelForCausalLM.from_pretrained(run_dir / "recovered" / NAME, dtype=torch.float32)
    with torch.no_grad():
        for domain, tokens_NS in windows.items():
            loss = loaded(tokens_NS, labels=tokens_NS).loss
            expected = pytest.approx(told["perplexity"][domain], rel=1e-4)  # fp32 logits
            assert float(loss.exp()) == expected
    here("evaluate", *settings(run_dir), *WORDS, "prune.methods=[wanda]")
    found = json.loads((run_dir / "results.json").read_text())["perplexity"]
    assert list(found) == ["dense", "wanda", LABEL]


def test_report_and_inspect_call_it_recovered(run_dir: Path, settings: Settings) -> None:
    here("report", *settings(run_dir))
    page = (run_dir / "report.html").read_text()
    assert f"<strong>{LABEL}</strong>" in page and f"<strong>{NAME}</strong>" not in page
    said = here("inspect", *settings(run_dir), NAME).stdout
    assert f"{LABEL}, not those of the base model" in said
    assert "kept weights" not in here("inspect", *settings(run_dir), "wanda").stdout
    loaded = AutoModelForCausalLM.from_pretrained(run_dir / "recovered" / NAME)
    with pytest.raises(ArtifactError, match="belongs to weights that wanda-reconstruct updated"):
        apply_masks(loaded, run_dir / "masks" / f"{NAME}.safetensors")


def test_push_says_that_the_model_is_recovered(
    run_dir: Path, settings: Settings, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(run_dir, tmp_path / "run"))
    words = [*settings(copy), "--dry-run", "--what", "model", f"export.mask={NAME}"]
    here("push", "owner/name", *words)
    card = (copy / "push" / "README.md").read_text()
    assert f"The kept weights are {LABEL}: they are not those of" in card and "- recovered" in card
    with HFReader(copy / "push") as pushed, HFReader(run_dir / "recovered" / NAME) as made:
        assert all(torch.equal(pushed.tensor(one), made.tensor(one)) for one in made.names())
    here("push", "owner/name", *words, "export.mask=wanda")
    assert "recovered" not in (copy / "push" / "README.md").read_text()


def test_a_result_is_made_once(
    run_dir: Path, model: Path, settings: Settings, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(run_dir, tmp_path / "run"))
    words = [*settings(copy), *WORDS, "recover.mask=wanda"]
    before = contents(copy)
    done = here("recover", *words, "evaluate.window=16")
    assert "reused" in done.stderr and contents(copy) == before
    window = load_masks(copy / "masks" / f"{NAME}.safetensors").meta["evaluation"]["window"]
    assert window != 16 and f"in held-out windows of {window} tokens" in done.stdout
    (copy / "masks" / "other-lora.safetensors").write_bytes(b"torn")
    asked = load_config(RECIPE, [*settings(copy), *WORDS, "evaluate.masks={wanda: wanda}"])
    assert list(find_masks(RunInputs(asked))) == ["wanda"]
    (copy / "masks" / "other-lora.safetensors").unlink()
    # What lies in the folder is replaced by what belongs there, and what lies beside the weights of
    # the model today goes along.
    hf, folder = Path(shutil.copytree(model, tmp_path / "hf")), copy / "recovered" / NAME
    (hf / "chat_template.jinja").write_text("of today")
    (folder / "model.safetensors").write_bytes(b"torn")
    assert "reused" in here("recover", *words, f"model.hf={hf}").stderr
    assert (folder / "chat_template.jinja").read_text() == "of today"
    found, made = contents(folder), contents(run_dir / "recovered" / NAME)
    both = {*made} - {"megamask_export.json"}  # which lists the files
    assert {*found} == {*made, "chat_template.jinja"}
    assert all(found[name] == made[name] for name in both)
    out = f"recover.out={tmp_path / 'out'}"
    here("recover", *words, "recover.solver=sequential", out)
    header = load_masks(copy / "masks" / f"{NAME}.safetensors").meta
    assert header["data"]["recovered"]["settings"]["solver"] == "sequential"
    assert json.loads((tmp_path / "out" / "megamask_export.json").read_text())["mask"] == {
        key: value for key, value in header.items() if key != "tensors"
    }


def test_another_blend_of_the_text_is_another_result(
    run_dir: Path, settings: Settings, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(run_dir, tmp_path / "run"))
    words = [*settings(copy), *WORDS, *TRAIN, "recover.mask=wanda", "recover.method=finetune"]
    data = []
    for blend in ("{prose: 0.7, code: 0.3}", "{prose: 0.3, code: 0.7}"):
        done = here("recover", *words, "recover.steps=1", f"data.blend={blend}")
        assert "reused" not in done.stderr
        data.append(load_masks(copy / "masks" / "wanda-finetune.safetensors").meta["data"])
    assert data[0]["blend"] != data[1]["blend"]
    assert data[0]["recovered"]["weights"] != data[1]["recovered"]["weights"]
    mask = load_masks(copy / "masks" / "wanda.safetensors").meta["data"]
    assert data[0]["recovered"]["mask_text"] == {"calibration": mask["calibration"]}
    # Equal shares of two domains are a tie at every second sample, which their order decides.
    there = load_config(RECIPE, words)
    turned = dict(reversed(there.data.domains.items()))
    data_of = [
        there,
        there.model_copy(update={"data": there.data.model_copy(update={"domains": turned})}),
    ]
    found = [RECOVERIES["finetune"].text(config) for config in data_of]
    assert recipe_differs(*found) and not recipe_differs(found[0], found[0])


def test_weights_go_with_the_mask_of_their_own_recipe_alone(
    run_dir: Path, settings: Settings, tmp_path: Path
) -> None:
    copy, old = Path(shutil.copytree(run_dir, tmp_path / "run")), tmp_path / "old.safetensors"
    weights, paths = copy / f"weights-{NAME}", run_paths(load_config(RECIPE, settings(copy)))

    def refused(verb: str, *words: str) -> str:
        return refusal(in_process(verb, *settings(copy), *WORDS, *words))

    for mask in ("dense", "wanda"):  # neither is a name for recovered weights
        said = refused("export", f"export.mask={mask}", f"export.weights={weights}")
        assert f"has weights that {NAME} updated" in said
    said = refused("export", f"export.mask={NAME}", f"export.weights={copy / 'weights'}")
    assert "which has weights of its own" in said and not (copy / "export").exists()
    here("extract", *settings(copy), NAME, str(old))
    check_named_weights(weights, load_masks(old))
    assert own_weights(load_masks(old), paths) == weights
    note = json.loads((weights / NOTE).read_text())
    note["recipe"]["recovered"]["settings"]["solver"] = "sequential"  # as another run writes it
    (weights / NOTE).write_text(json.dumps(note))
    for verb, *words in (
        ("evaluate", f"evaluate.masks={{old: {old}}}"),
        ("export", f"export.mask={old}"),
        ("export", f"export.mask={old}", f"export.weights={weights}"),
        ("push", "owner/name", "--dry-run", "--what", "model", f"export.mask={old}"),
    ):
        said = refused(verb, *words)
        assert "does not belong to the mask" in said and "prune" not in said


def test_refusals(run_dir: Path, model: Path, settings: Settings) -> None:
    def refused(*words: str) -> str:
        return refusal(in_process("recover", *settings(run_dir), *WORDS, *words))

    before = contents(run_dir)
    assert "belongs to updated weights" in refused(f"recover.mask={NAME}")
    assert "learned.safetensors: is missing" in refused()
    said = refused("recover.mask=wanda", f"recover.out={model}")
    assert "recover.out" in said and "a folder other than model.hf" in said
    said = refused("recover.mask=wanda", f"recover.out={run_dir / 'shards'}")
    assert "holds files that this verb did not make" in said
    assert "calibration.seq_length" in refused(
        "recover.mask=wanda", "calibration.seq_length=100000"
    )
    said = refused("recover.mask=wanda", "evaluate.window=100000")
    assert "evaluate.window" in said and "the positions of the model" in said
    assert contents(run_dir) == before


def test_a_result_of_an_older_mask_stands_beside_no_other(
    run_dir: Path, settings: Settings, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(run_dir, tmp_path / "run"))
    words = [*settings(copy), *WORDS, "prune.methods=[wanda]"]

    def rows() -> list[str]:
        return list(json.loads((copy / "results.json").read_text())["perplexity"])

    here("evaluate", *words)
    assert rows() == ["dense", "wanda", LABEL]
    here("prune", *words, "calibration.seed=7")
    here("report", *words)
    assert LABEL in (copy / "report.html").read_text()  # the file is there, and named
    assert f"<td>{LABEL}</td>" not in (copy / "report.html").read_text()
    said = here("evaluate", *words).stderr
    assert f"{NAME}.safetensors was recovered under another mask wanda than the run has" in said
    assert rows() == ["dense", "wanda"]
    here("recover", *words, "recover.mask=wanda")
    assert "under another mask" not in here("evaluate", *words).stderr
    assert rows() == ["dense", "wanda", LABEL]


def test_a_mask_of_a_copy_in_another_dtype(
    prepared: Path, model: Path, settings: Settings, tmp_path: Path
) -> None:
    """The mask was made on the bf16 model, and the run has its copy in fp16. What is recovered
    belongs to the copy.
    """
    held, run_dir, mask = tmp_path / "held", tmp_path / "run", tmp_path / "of-bf16.safetensors"
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16).save_pretrained(held)
    for file in model.glob("token*"):
        shutil.copy(file, held)
    shutil.copytree(prepared / "shards", run_dir / "shards")
    shutil.copy(prepared / "masks" / "wanda.safetensors", mask)
    words = [*settings(run_dir), *WORDS, f"model.hf={held}"]
    here("convert", *words)
    here("recover", *words, f"recover.mask={mask}")
    recovered = load_masks(run_dir / "masks" / "of-bf16-reconstruct.safetensors")
    note = json.loads((run_dir / "weights" / NOTE).read_text())
    assert recovered.fingerprint == note["fingerprint"] != load_masks(mask).fingerprint
    here("evaluate", *words, "evaluate.masks={a: of-bf16-reconstruct}")
    found = json.loads((run_dir / "results.json").read_text())["perplexity"]
    (row,) = (name for name in found if name.startswith("a, recovered"))
    assert found[row] == pytest.approx(recovered.meta["evaluation"]["perplexity"], rel=1e-6)
    assert "reused" in here("recover", *words, f"recover.mask={mask}").stderr
    here("export", *words, "export.mask=of-bf16-reconstruct", f"export.out={tmp_path / 'out'}")


def test_a_snapshot_that_goes_away_meanwhile(
    general: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that still learns deletes its older snapshots; the recovery has begun by then."""
    run_dir = Path(shutil.copytree(general, tmp_path / "run"))
    snapshots, kind = run_dir / "learn" / "snapshots", type(RECOVERIES["reconstruct"])
    real = kind.recover

    def meanwhile(self: Any, job: Any) -> Any:
        shutil.rmtree(snapshots)
        return real(self, job)

    monkeypatch.setattr(kind, "recover", meanwhile)
    here("recover", *settings(run_dir), *WORDS, f"recover.mask={snapshots}")
    found = load_masks(run_dir / "masks" / "snapshots-reconstruct.safetensors")
    learned = load_masks(run_dir / "masks" / "learned.safetensors")
    assert all(torch.equal(found[name], learned[name]) for name in learned)
    assert not list(run_dir.glob("recovering-*"))


def test_parts_of_another_recovery_that_stay_are_refused(
    run_dir: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(run_dir, tmp_path / "run"))
    folder = copy / f"recovering-{NAME}"
    folder.mkdir()
    (folder / "layer-0000-0.safetensors").touch()
    words = [*settings(copy), *WORDS, "recover.mask=wanda"]
    here("recover", *words)  # a run that was killed at its end leaves such a folder
    assert not folder.exists()
    folder.mkdir()
    (folder / "layer-0000-0.safetensors").touch()
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **more: None)
    said = refusal(in_process("recover", *words, "recover.solver=sequential"))
    assert "cannot be deleted" in said and str(folder) in said


def test_masks_of_two_runs_with_one_name_share_no_result(
    run_dir: Path, settings: Settings, tmp_path: Path
) -> None:
    """The name of a result follows from that of its mask file, which other runs have too."""
    paths = run_paths(load_config(RECIPE, settings(run_dir)))
    theirs = tmp_path / "wanda.safetensors"
    shutil.copy(paths.mask("magnitude"), theirs)

    def refused(mask: Path | str) -> str:
        return refusal(in_process("recover", *settings(run_dir), *WORDS, f"recover.mask={mask}"))

    before = contents(run_dir)
    assert "another name than wanda" in refused(theirs) and contents(run_dir) == before
    ours = load_masks(paths.mask(NAME))
    about = {**ours.meta["data"]["recovered"], OF_ANOTHER_RUN: True, "mask_sha256": "theirs"}
    data = {**ours.meta["data"], "recovered": about}
    assert recipe_of({"data": data})["recovered"].keys() == recipe_of(ours.meta)["recovered"].keys()
    kept = paths.mask(NAME).read_bytes()
    facts: Any = {"fingerprint": ours.fingerprint, "method": NAME, "updated_weights": True}
    save_masks(paths.mask(NAME), ours, ours.patterns, data=data, **facts)
    try:
        assert "another name than wanda" in refused("wanda")
    finally:
        paths.mask(NAME).write_bytes(kept)


TRAIN = (
    "recover.steps=8",
    "recover.global_batch=4",
    "recover.micro_batch=2",
    "recover.rate=3e-3",
    "recover.rank=4",
)


@pytest.mark.parametrize("method", ["finetune", "lora"])
def test_training_lowers_the_perplexity_and_resumes(
    method: str,
    prepared: Path,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, first, second = f"wanda-{method}", tmp_path / "first", tmp_path / "second"
    words = [*WORDS, *TRAIN, "recover.mask=wanda", f"recover.method={method}"]
    words += ["recover.distillation=0.5"] if method == "lora" else []
    for run_dir in (first, second):
        shutil.copytree(prepared, run_dir)
    here("recover", *settings(first), *words)
    masks = load_masks(first / "masks" / f"{name}.safetensors")
    told = masks.meta["evaluation"]
    for domain, frozen in told["frozen"].items():
        assert told["perplexity"][domain] < 0.9 * frozen
    assert told["loss"][1] < told["loss"][0]
    with HFReader(first / "recovered" / name) as reader:
        for module, mask_OI in masks.items():
            pruned = reader.tensor(f"{module}.weight")[~mask_OI]
            assert not pruned.any() and not torch.signbit(pruned).any()

    # Training stops after a snapshot, at weights that are not finite; the second start ends with
    # the same bits.
    def stopped(*args: Any) -> float:
        if args[5] == 5:
            next(iter(args[1].values())).parameters[0].data.fill_(math.nan)
        return step(*args)

    step = training._step
    monkeypatch.setattr(training, "_step", stopped)
    more = [*words, "recover.snapshot_every=3"]
    said = refusal(in_process("recover", *settings(second), *more))
    assert "step 6: the loss is nan" in said and "training starts anew" in said
    monkeypatch.undo()
    assert (second / f"recovering-{name}").is_dir() and not (second / "recovered" / name).exists()
    assert "goes on after step 3" in here("recover", *settings(second), *more).stderr
    assert contents(second / "recovered") == contents(first / "recovered")
    assert not list(second.glob("recovering-*"))
    if method == "lora":  # the merged folder computes as training did, with the dense teacher too
        here("evaluate", *settings(first), *WORDS, f"evaluate.masks={{lora: {name}}}")
        rows = json.loads((first / "results.json").read_text())["perplexity"]
        assert rows["lora, recovered (wanda + lora)"] == pytest.approx(told["perplexity"], rel=1e-6)


def test_blockwise_lowers_the_error_of_every_layer_and_resumes(
    prepared: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, second = (Path(shutil.copytree(prepared, tmp_path / name)) for name in "ab")
    more = [*WORDS, "recover.mask=wanda", "recover.method=blockwise"]
    words, steps = [*settings(run_dir), *more], ["recover.steps=12", "recover.rate=3e-3"]
    here("recover", *words, *steps)
    path = run_dir / "masks" / "wanda-blockwise.safetensors"
    told = load_masks(path).meta["evaluation"]
    pairs = list(zip(*told["output_error"].values(), strict=True))
    assert len(pairs) == 2 and all(new < 0.8 * old for old, new in pairs)

    # Recovery stops in the second layer; the second start takes the first layer as it was, and ends
    # with the same bits.
    layers: list[str] = []

    def stopped(*args: Any) -> Any:
        if layers:
            raise LearningError("stopped in the second layer. Start it again.")
        return made(*args)

    def made(*args: Any) -> Any:
        layers.append(min(args[5]))
        return layer(*args)

    layer = blockwise._layer
    monkeypatch.setattr(blockwise, "_layer", stopped)
    words = [*settings(second), *more]
    assert "stopped in the second" in refusal(in_process("recover", *words, *steps))
    unfinished = second / "recovering-wanda-blockwise"
    assert [one.name for one in unfinished.glob("layer-*")] == ["layer-0001-0.safetensors"]
    assert not (second / "recovered" / "wanda-blockwise").exists()
    monkeypatch.setattr(blockwise, "_layer", made)
    here("recover", *words, *steps)
    assert len(layers) == 2 and layers[0] != layers[1] and not unfinished.exists()
    assert contents(second / "recovered") == contents(run_dir / "recovered")
    found = load_masks(second / "masks" / "wanda-blockwise.safetensors")
    assert found.meta["evaluation"] == told
    monkeypatch.undo()

    # A rate that throws the weights away leaves the layers as they are, and says so.
    said = here("recover", *words, "recover.steps=2", "recover.rate=100").stderr
    assert said.count("its error did not fall") == 2
    found = load_masks(found.path)
    assert found.meta["evaluation"]["perplexity"] == found.meta["evaluation"]["frozen"]
