"""Every verb on the debug recipe, in processes of its own; what one verb makes, the next one and
plain transformers can use.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megamask import apply_masks, load_masks
from megamask.errors import ArtifactError
from megamask.evaluate.rows import Row, Rows
from megamask.sparsity.pattern import Pattern
from tests.e2e.program import Finished, contents, here, in_process, in_ranks, megamask, refusal
from tests.masks import is_valid

pytestmark = pytest.mark.slow

METHODS = ("magnitude", "wanda", "sparsegpt", "sparsegpt_update")
DOMAINS = ("prose", "code")
WINDOW, MAX_TOKENS = 32, 512  # of the debug recipe
Settings = Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def pipeline(
    prepared: Path, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Finished]]:
    """A run folder in which every verb has run, and what the later ones said."""
    run_dir = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("pipeline") / "run"))
    return run_dir, {
        verb: megamask(verb, *settings(run_dir), fresh=verb == "learn")
        for verb in ("learn", "export", "evaluate", "report", "inspect")
    }


@pytest.fixture(scope="module")
def results(pipeline: tuple[Path, Any]) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((pipeline[0] / "results.json").read_text())
    return parsed


def test_weights_and_shards_are_there(prepared: Path, model: Path) -> None:
    note = json.loads((prepared / "weights" / "megamask.json").read_text())
    assert note["source"] == str(model)
    assert (prepared / "weights" / "config.json").read_bytes() == (
        model / "config.json"
    ).read_bytes()
    for domain in DOMAINS:
        meta = json.loads((prepared / "shards" / domain / "meta.json").read_text())
        assert all(meta["splits"][split]["tokens"] > MAX_TOKENS for split in ("train", "heldout"))


@pytest.mark.parametrize("method", [*METHODS, "learned"])
def test_a_mask_file_is_valid(pipeline: tuple[Path, Any], method: str) -> None:
    masks = load_masks(pipeline[0] / "masks" / f"{method}.safetensors")
    masks.verify()
    assert masks.method == method
    assert len(masks) == 2 * 7  # two layers; q, k, v, o, gate, up, down
    assert all(is_valid(Pattern(2, 4), mask) for mask in masks.values())


def test_learning_moves_the_mask_and_helps(
    pipeline: tuple[Path, Any], results: dict[str, Any]
) -> None:
    learned, prior = (
        load_masks(pipeline[0] / "masks" / f"{method}.safetensors")
        for method in ("learned", "sparsegpt")
    )
    assert any(not torch.equal(learned[name], prior[name]) for name in learned)
    assert all(
        results["perplexity"]["learned"][domain] < results["perplexity"]["sparsegpt"][domain]
        for domain in DOMAINS
    )


def test_the_learning_folder_is_complete(pipeline: tuple[Path, Any]) -> None:
    folder = pipeline[0] / "learn"
    assert {"config.yaml", "versions.json", "log.txt", "metrics.jsonl"} <= {
        path.name for path in folder.iterdir()
    }
    assert sorted(path.name for path in (folder / "snapshots").iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3, 4]
    assert [record["step"] for record in records if record["kind"] == "evaluation"] == [0, 2, 4]
    assert all(
        0 <= record[share] <= 1
        for record in records
        if record["kind"] == "train"
        for share in ("max_prob", "flip_rate")
    )


def test_results_hold_perplexities_protocol_and_sizes(
    pipeline: tuple[Path, Any], results: dict[str, Any]
) -> None:
    rows = ["dense", *METHODS, "learned"]
    quantities = {"perplexity", "kl", "agreement"}
    facts = {"protocol", "seconds", "density", "mask_bytes", "masks", "pattern", "model_sha256"}
    assert set(results) == quantities | facts
    assert results["pattern"] == dict.fromkeys(rows[1:], "2:4")
    assert list(results["perplexity"]) == rows
    assert list(results["kl"]) == list(results["agreement"]) == rows[1:]
    assert all(1 < results["perplexity"][row][domain] < 10000 for row in rows for domain in DOMAINS)
    protocol = results["protocol"]
    assert {
        "name",
        "window",
        "stride",
        "targets_per_window",
        "tail",
        "bos",
        "dtype",
        "tokenizer",
        "tokenizer_sha256",
        "split",
        "text_sha256",
        "windows",
        "tokens",
        "compared_targets",
    } == set(protocol)
    assert protocol["name"] == "heldout"
    assert protocol["windows"] == dict.fromkeys(DOMAINS, MAX_TOKENS // WINDOW)
    assert (protocol["window"], protocol["stride"], protocol["targets_per_window"]) == (
        WINDOW,
        WINDOW,
        WINDOW - 1,
    )
    assert (protocol["dtype"], protocol["bos"], protocol["tokens"]) == (
        "fp32",
        "none",
        dict.fromkeys(DOMAINS, MAX_TOKENS),
    )
    assert results["density"] == {"dense": 1.0, **dict.fromkeys(rows[1:], 0.5)}
    files = {row: pipeline[0] / "masks" / f"{row}.safetensors" for row in rows[1:]}
    assert results["mask_bytes"] == {row: file.stat().st_size for row, file in files.items()}
    # A row says where its own weights are, if it has any.
    own = {"sparsegpt_update": {"weights": "sparsegpt_update"}}
    assert results["masks"] == {
        row: {"sha256": mask.content_sha256, "fingerprint": mask.fingerprint, **own.get(row, {})}
        for row, mask in ((row, load_masks(file)) for row, file in files.items())
    }
    assert set(METHODS) <= set(results["seconds"])


def transformers_perplexity(hf_dir: Path, run_dir: Path, domain: str) -> float:
    """The protocol in plain numpy, torch and transformers: exp of the mean over the targets of all
    windows.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32).eval()
    stream = np.fromfile(run_dir / "shards" / domain / "heldout.bin", dtype=np.uint16)[:MAX_TOKENS]
    windows = torch.from_numpy(stream.astype(np.int64)).view(-1, WINDOW)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].double()
    return math.exp(
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    )


@torch.no_grad()
def transformers_distance(dense: Path, masked: Path, run_dir: Path, domain: str) -> list[float]:
    """KL(dense || masked) in fp64, and the share of equal top tokens, over the same targets."""
    from transformers import AutoModelForCausalLM

    stream = np.fromfile(run_dir / "shards" / domain / "heldout.bin", dtype=np.uint16)[:MAX_TOKENS]
    windows = torch.from_numpy(stream.astype(np.int64)).view(-1, WINDOW)
    p, q = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(windows)
        .logits[:, :-1]
        .double()
        .log_softmax(-1)
        for folder in (dense, masked)
    )
    same = (p.argmax(-1) == q.argmax(-1)).double()
    return [float((p.exp() * (p - q)).sum(-1).mean()), float(same.mean())]


@pytest.mark.parametrize("domain", DOMAINS)
def test_transformers_agrees_with_evaluate(
    pipeline: tuple[Path, Any], results: dict[str, Any], model: Path, domain: str
) -> None:
    run_dir = pipeline[0]
    exported = transformers_perplexity(run_dir / "export", run_dir, domain)
    # Both compute in fp32; two orders of summation move a loss of about 6 by about 1e-6, and the
    # perplexity relatively as much.
    assert exported == pytest.approx(results["perplexity"]["learned"][domain], rel=2e-5)
    dense = transformers_perplexity(model, run_dir, domain)
    assert dense == pytest.approx(results["perplexity"]["dense"][domain], rel=2e-5)
    assert dense != pytest.approx(
        exported, rel=1e-2
    )  # the comparison sees a mask that is not applied

    distance = [results[key]["learned"][domain] for key in ("kl", "agreement")]
    expected = transformers_distance(model, run_dir / "export", run_dir, domain)
    # The divergence is a difference of losses of about 6, so it has their absolute error.
    assert distance[0] == pytest.approx(expected[0], abs=1e-5)
    assert distance[1] == pytest.approx(expected[1], abs=1.5 / MAX_TOKENS)  # one near tie at most
    other_way = transformers_distance(run_dir / "export", model, run_dir, domain)
    assert distance[0] != pytest.approx(other_way[0], abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_whatever_is_exported_is_what_was_measured(
    pipeline: tuple[Path, Any],
    results: dict[str, Any],
    settings: Callable[[Path], list[str]],
    tmp_path: Path,
    method: str,
) -> None:
    """Also of a method with weights of its own, which are exported with its mask."""
    run_dir, out = pipeline[0], tmp_path / "out"
    done = in_process("export", *settings(run_dir), f"export.mask={method}", f"export.out={out}")
    assert done.code == 0, done.stderr
    measured = results["perplexity"]
    for domain in DOMAINS:
        found = transformers_perplexity(out, run_dir, domain)
        assert found == pytest.approx(measured[method][domain], rel=2e-5)  # fp32, as above
        others = {measured[row][domain] for row in measured if row != method}
        assert all(found != pytest.approx(other, rel=2e-5) for other in others)


def test_megatron_weights_become_the_folder_that_they_were_converted_from(
    pipeline: tuple[Path, Any],
    settings: Callable[[Path], list[str]],
    model: Path,
    tmp_path: Path,
) -> None:
    from safetensors.torch import load_file

    run_dir, out = pipeline[0], tmp_path / "out"
    weights = [f"export.weights={run_dir / 'weights'}", "export.mask=dense"]
    done = in_process("export", *settings(run_dir), *weights, f"export.out={out}")
    assert done.code == 0, done.stderr
    found, expected = (load_file(folder / "model.safetensors") for folder in (out, model))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_mask_of_updated_weights_is_not_applied_to_others(
    pipeline: tuple[Path, Any], model: Path
) -> None:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    with pytest.raises(ArtifactError, match="megamask export export.mask=sparsegpt_update"):
        apply_masks(loaded, pipeline[0] / "masks" / "sparsegpt_update.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())


def test_updated_weights_that_are_gone_or_others_are_refused(
    pipeline: tuple[Path, Any], settings: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(pipeline[0], tmp_path / "run"))
    weights = run_dir / "weights-sparsegpt_update"
    note = json.loads((weights / "megamask.json").read_text())
    (weights / "megamask.json").write_text(json.dumps({**note, "fingerprint": "0" * 64}))
    for problem in ("does not belong to the mask", "is missing"):
        for verb, key in (("export", "export.mask"), ("evaluate", "evaluate.masks.row")):
            done = in_process(verb, *settings(run_dir), f"{key}=sparsegpt_update")
            assert problem in refusal(done)
        shutil.rmtree(weights, ignore_errors=True)


def test_the_exported_folder_is_plain_and_holds_the_mask(
    pipeline: tuple[Path, Any], model: Path
) -> None:
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    folder, masks = (
        pipeline[0] / "export",
        load_masks(pipeline[0] / "masks" / "learned.safetensors"),
    )
    written, dense = load_file(folder / "model.safetensors"), load_file(model / "model.safetensors")
    assert written.keys() == dense.keys()
    for name, tensor in dense.items():
        mask = masks.get(name.removesuffix(".weight"))
        assert torch.equal(
            written[name], tensor if mask is None else torch.where(mask, tensor, 0.0)
        )
    text = "the mask keeps two of every four weights"
    assert (
        AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
        == AutoTokenizer.from_pretrained(model)(text)["input_ids"]
    )


def test_report_and_inspect(pipeline: tuple[Path, dict[str, Finished]]) -> None:
    run_dir, said = pipeline
    page = (run_dir / "report.html").read_text()
    assert all(word in page for word in ("learned mask", "SparseGPT mask", *DOMAINS))
    assert "| learned mask" in said["report"].stdout
    assert list((run_dir / "pictures").iterdir())
    assert f"{run_dir / 'masks' / 'learned.safetensors'}: valid" in said["inspect"].stdout


def test_a_second_run_of_every_verb_changes_nothing(
    pipeline: tuple[Path, Any], settings: Settings
) -> None:
    run_dir = pipeline[0]
    before = contents(run_dir)
    for verb in (
        "convert",
        "tokenize",
        "prune",
        "learn",
        "export",
        "evaluate",
        "report",
        "inspect",
    ):
        finished = in_process(verb, *settings(run_dir))
        assert finished.code == 0, f"{verb}\n{finished.stderr}"
    after = contents(run_dir)
    assert {
        name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
    } == {"learn/log.txt", "learn/heartbeat.json"}  # one grows, one says when


def test_two_tensor_parallel_ranks(
    pipeline: tuple[Path, Any], prepared: Path, settings: Settings, tmp_path: Path
) -> None:
    alone, run_dir = pipeline[0], tmp_path / "run"
    shutil.copytree(prepared / "shards", run_dir / "shards")
    verbs = ("convert", "prune", "learn", "evaluate")
    # three patterns in one model, from weights that one rank wrote
    folders = [
        Path(shutil.copytree(prepared, tmp_path / name)) for name in ("mixed", "mixed-alone")
    ]
    entries = '{"*.down_proj": "6:8", "model.layers.0.self_attn.*": "4:8:pair"}'
    mixed = [f"pattern_overrides={entries}", "prune.methods=[sparsegpt]", "learn.steps=2"]
    in_ranks(
        2,
        *([verb, *settings(run_dir), "parallel.tp=2"] for verb in verbs),
        *([verb, *settings(folders[0]), *mixed, "parallel.tp=2"] for verb in ("prune", "learn")),
    )
    for verb in ("prune", "learn"):
        here(verb, *settings(folders[1]), *mixed)
    for method in ("sparsegpt", "learned"):
        ours, theirs = (load_masks(one / "masks" / f"{method}.safetensors") for one in folders)
        assert ours.patterns == theirs.patterns and len(ours.patterns.distinct) == 3
        pairs = [(ours.index(name), theirs.index(name)) for name in ours]
        differ = sum(int((one != other).sum()) for one, other in pairs)
        # near ties, as below
        assert differ <= 0.005 * sum(one.numel() for one, _ in pairs), method
    for method in (*METHODS, "learned"):
        ours, theirs = (
            load_masks(folder / "masks" / f"{method}.safetensors") for folder in (run_dir, alone)
        )
        groups = sum(ours.index(name).numel() for name in ours)
        differ = sum(int((ours.index(name) != theirs.index(name)).sum()) for name in ours) / groups
        # Sums over ranks round differently, which decides near ties only: far fewer groups than
        # learning moves (some percent).
        assert differ <= (0 if method == "magnitude" else 0.005), (
            f"{method}: {differ:.2%} of the groups differ"
        )
    both = json.loads((run_dir / "results.json").read_text())
    # What two processes made, one can evaluate. fp32 rounding, as above.
    assert in_process("evaluate", *settings(run_dir)).code == 0
    one = json.loads((run_dir / "results.json").read_text())
    spread, whole = both["perplexity"], one["perplexity"]
    assert all(spread[row] == pytest.approx(whole[row], rel=2e-5) for row in whole)
    for row in (*METHODS, "learned"):
        assert both["kl"][row] == pytest.approx(one["kl"][row], abs=1e-5)
        assert both["agreement"][row] == pytest.approx(one["agreement"][row], abs=1.5 / MAX_TOKENS)
    assert spread["dense"] == pytest.approx(
        json.loads((alone / "results.json").read_text())["perplexity"]["dense"], rel=2e-5
    )


def test_files_that_are_lost_while_evaluate_measures_cost_nothing(
    run_dir: Path,
    model: Path,
    settings: Callable[[Path], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "hf"))
    measure = Rows.dense

    def measure_and_lose(rows: Rows) -> Row:
        shutil.rmtree(copy)
        (run_dir / "stages.json").write_text("{")
        return measure(rows)

    monkeypatch.setattr(Rows, "dense", measure_and_lose)
    masks = run_dir / "masks" / "magnitude.safetensors"
    words = [f"data.tokenizer={copy}", f"evaluate.masks={{magnitude: {masks}}}"]
    assert in_process("evaluate", *settings(run_dir), *words).code == 0
    results = json.loads((run_dir / "results.json").read_text())
    assert set(results["perplexity"]) == {"dense", "magnitude"}
    assert results["protocol"]["bos"] == "none" and not copy.exists()
