"""A measurement with its files, on a CPU by a stand-in for the kernel, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from megamask.__main__ import main
from megamask.config import build_config
from megamask.config.speed_tree import SpeedSection
from megamask.errors import EXIT_USER_ERROR, ArtifactError, ConfigError
from megamask.report.result_kinds import read_result_tables
from megamask.report.speed_results import read_speed, speed_markdown
from megamask.runtime.device_facts import DeviceFacts
from megamask.runtime.speed_run import check_positions, measure, passes_of
from megamask.runtime.speed_subject import subject_of_folder, subject_of_shape
from megamask.runtime.speed_table import read_table
from megamask.verbs.report import run as report
from megamask.verbs.speed import write_shown
from tests.fuzz.mutations import json_writer, survives
from tests.unit.masks.test_apply import tiny_model
from tests.unit.runtime.cpu_kernels import CpuDevice, products_on_a_cpu, prune

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SECTION = SpeedSection(tokens=[2, 1], prompt=4, generate=3, batch=1, rounds=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 2:4 zeros in all linears but one layer's down_proj, which was kept dense."""
    model = tiny_model(**SIZES).to(torch.bfloat16)
    prune(model, but="layers.1.mlp.down_proj")
    path = tmp_path_factory.mktemp("model") / "export"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def timed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The table of all shapes, before anything is generated."""
    subject, run_dir = subject_of_folder(folder, "bf16"), tmp_path_factory.mktemp("timed")
    with products_on_a_cpu():
        found = measure(SECTION, replace(subject, folder=None), CpuDevice(), run_dir)
    return {**found, "made_from": {**found["made_from"], "files": subject.facts()["files"]}}


def generated(folder: Path, timed: dict[str, Any], run_dir: Path, speed_up: list[float]) -> Path:
    """A run folder with the rates of generation that follow a table with these gains. (The stand-in
    for the kernel is slow: the gains that were measured say nothing.)
    """
    rows = [{**row, "speed_up": speed_up} for row in timed["rows"]]
    (run_dir / "speed.json").write_text(json.dumps({**timed, "rows": rows}))
    with products_on_a_cpu():
        measure(SECTION, subject_of_folder(folder, "bf16"), CpuDevice(), run_dir)
    return run_dir


@pytest.fixture(scope="module")
def measured(folder: Path, timed: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the results, in which 2:4 is faster."""
    return generated(folder, timed, tmp_path_factory.mktemp("run"), [1.9, 2.0, 2.1])


def test_all_is_measured_and_shown(
    measured: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = read_table(measured / "speed.json")
    # q and o, k and v, gate and up, down; 1 and 2 tokens, and the 4 of the prompt
    shapes = [(64, 64), (32, 64), (128, 64), (64, 128)]
    assert [(row.shape, row.tokens) for row in table.rows] == [
        (shape, tokens) for shape in shapes for tokens in (1, 2, 4)
    ]
    assert table.passes == {4: 1, 1: 2} and all(row.sparse_ms for row in table.rows)
    found = json.loads((measured / "speed.json").read_text())
    assert found["made_from"]["linears"] == [[64, 64, 4], [32, 64, 4], [128, 64, 4], [64, 128, 1]]
    assert found["made_from"]["dense"] == 1
    ways = found["generation"]
    assert ways["same_token"] > 0.7  # of 4 places; near-ties of random weights may differ
    assert ways["dense"]["rate"] > 0 and ways["2:4"]["prefill_ms"] > 0
    choices = {one["names"]: one for one in ways["choices"]}
    assert choices["lm_head"]["why"].startswith("cutlass takes multiples of")  # 50 words

    write_shown(measured)
    said = capsys.readouterr().out
    assert (measured / "speed.md").read_text().strip() == said.strip()
    assert (measured / "speed.png").read_bytes().startswith(b"\x89PNG")
    for words in (
        "64 x 128 bf16",
        "4 (prefill)",
        "1 (decode)",
        "gain",
        "tokens/s",
        "a CPU of tests",
    ):
        assert words in said, words


def test_a_model_that_gains_nowhere_has_one_rate(
    measured: Path, folder: Path, timed: dict[str, Any], tmp_path: Path
) -> None:
    """The rate of 2:4 would be that of the same dense model."""
    ways = json.loads((measured / "speed.json").read_text())["generation"]
    assert {one["kernel"] for one in ways["choices"]} == {"cutlass", None}
    assert ways["2:4"]["weight_bytes"] < ways["dense"]["weight_bytes"]
    file = generated(folder, timed, tmp_path, [0.4, 0.5, 0.6]) / "speed.json"
    content = json.loads(file.read_text())
    found = content["generation"]
    assert set(found) == {"dense", "choices", "why"} and "stays dense" in found["why"]
    again: dict[str, Any] = {"2:4": found["dense"], "same_token": 1.0}  # of an older version
    for more in ({}, again):
        file.write_text(json.dumps({**content, "generation": {**found, **more}}))
        shown = speed_markdown(read_speed(file))
        assert "No linear gains by a 2:4 kernel, so there is no second rate." in shown
        assert shown.count("tokens/s in all") == 1 and "most likely token" not in shown
        assert "down_proj (1): dense; no gain" in shown
        assert "lm_head (1): dense; cutlass takes multiples of" in shown


def test_the_report_has_a_section(measured: Path) -> None:
    report(build_config({"run_dir": str(measured)}))
    page = (measured / "report.html").read_text()
    shown = page.split("<h2>Speed</h2>")[1].split("<h2>")[0]
    assert "64 x 128 bf16" in shown and shown.count("data:image/png") == 1
    assert (measured / "pictures" / "speed.png").exists()


def test_a_killed_run_goes_on_and_other_conditions_do_not(
    folder: Path, measured: Path, tmp_path: Path
) -> None:
    subject, file = subject_of_folder(folder, "bf16"), tmp_path / "speed.json"
    alone = SECTION.model_copy(update={"generate": 0, "tokens": [1]})

    def again(content: Any, section: SpeedSection = alone, device: Any = None) -> Any:
        file.write_text(json.dumps(content))
        with products_on_a_cpu():
            return measure(section, subject, device or CpuDevice(), tmp_path)

    finished = json.loads((measured / "speed.json").read_text())
    again(finished, SECTION)
    assert json.loads(file.read_text()) == finished  # the rate of generation is taken over too
    again({})
    whole = json.loads(file.read_text())
    for row in whole["rows"]:
        row["dense_ms"] = 77.0
    found = again({**whole, "rows": whole["rows"][:4]})
    assert json.loads(json.dumps(found["rows"][:4])) == whole["rows"][:4]
    assert len(found["rows"]) == 8 and found["rows"][4]["dense_ms"] != 77.0
    other = CpuDevice()
    other.facts = lambda: DeviceFacts("another", "0.0", "0.0")  # type: ignore[method-assign]
    for found in (
        again({**whole, "rows": whole["rows"][:3]}),  # torn within a shape
        again(whole, alone.model_copy(update={"rounds": 2})),
        again({**whole, "rows": "none"}),
        again(whole, device=other),
    ):
        assert len(found["rows"]) == 8 and not any(row["dense_ms"] == 77.0 for row in found["rows"])
    assert found["device"] == "another"


def test_without_answers_nothing_is_generated(folder: Path, tmp_path: Path) -> None:
    section = SECTION.model_copy(update={"generate": 0, "tokens": [1]})
    with products_on_a_cpu():
        found = measure(section, subject_of_folder(folder, "bf16"), CpuDevice(), tmp_path)
    assert found["generation"] is None and set(found["passes"]) == {"4"}
    assert "tokens/s" not in speed_markdown(read_speed(tmp_path / "speed.json"))


def test_a_model_without_plain_linears_says_so(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64)).bfloat16()
    prune(model)
    model.save_pretrained(tmp_path / "hf")
    # Conv1D keeps (I, O): prune its groups of inputs
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")):
                weight[2::4] = 0
                weight[3::4] = 0
    model.save_pretrained(tmp_path / "hf")
    section = SECTION.model_copy(update={"generate": 1, "tokens": [1]})
    with products_on_a_cpu():
        measure(section, subject_of_folder(tmp_path / "hf", "bf16"), CpuDevice(), tmp_path)
    shown = speed_markdown(read_speed(tmp_path / "speed.json"))
    assert "No linear can use a 2:4 kernel" in shown and "Conv1D" in shown


def test_results_that_were_changed_by_hand_are_shown_or_refused(
    measured: Path, tmp_path: Path
) -> None:
    path = tmp_path / "speed.json"
    content = json.loads((measured / "speed.json").read_text())
    content["rows"] = content["rows"][:2]

    def show() -> None:
        (table,) = read_result_tables(tmp_path)
        assert speed_markdown(table)

    survives(show, json_writer(path, content), count=300)


def test_passes_of_a_workload() -> None:
    assert passes_of(SpeedSection()) == {512: 1, 1: 127}
    assert passes_of(SpeedSection(batch=8)) == {4096: 1, 8: 127}
    assert passes_of(SpeedSection(prompt=1, generate=5)) == {1: 5}
    assert passes_of(SpeedSection(generate=0)) == passes_of(SpeedSection(generate=1)) == {512: 1}
    with pytest.raises(ConfigError, match=r"speed\.batch = 4096: speed\.prompt x speed\.batch is"):
        passes_of(SpeedSection(batch=4096))


def test_prompts_that_the_model_has_no_places_for_are_refused(folder: Path) -> None:
    subject = subject_of_folder(folder, "bf16")
    check_positions(SECTION, subject)
    with pytest.raises(ConfigError, match=r"speed\.prompt = 2048: prompt and answer have 2,176"):
        check_positions(SpeedSection(prompt=2048), subject)
    check_positions(SpeedSection(prompt=2048), subject_of_shape("llama2-7b", "bf16"))  # no answer


def test_shapes_of_models() -> None:
    subject = subject_of_shape("llama2-7b", "fp16")
    assert subject.shapes == {(4096, 4096): 128, (11008, 4096): 64, (4096, 11008): 32}
    with pytest.raises(ConfigError, match="--model = 'lama2-7b': one of"):
        subject_of_shape("lama2-7b", "bf16")


@pytest.mark.parametrize(
    ("sizes", "is_pruned", "said"),
    [
        (SIZES, False, "has no linear whose weights are 2:4"),
        (
            {**SIZES, "hidden_size": 40, "intermediate_size": 88, "num_attention_heads": 2},
            True,
            "has no linear that a 2:4 kernel takes; 40 x 40: cusparselt takes multiples of 16 rows",
        ),
    ],
)
def test_folders_that_cannot_gain_are_refused(
    tmp_path: Path, sizes: dict[str, int], is_pruned: bool, said: str
) -> None:
    model = tiny_model(**sizes)
    if is_pruned:
        prune(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ArtifactError) as found:
        subject_of_folder(tmp_path, "bf16")
    assert said in str(found.value), str(found.value)


@pytest.mark.parametrize("words", [[], ["--model", "llama2-7b"], ["device=cpu"]])
def test_without_a_gpu_the_verb_says_what_it_needs_and_writes_nothing(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available() and "device=cpu" not in words:
        pytest.skip("there is a GPU")
    assert main(["speed", f"run_dir={tmp_path / 'run'}", *words]) == EXIT_USER_ERROR
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("megamask: error: device = "), said
    assert "CUDA device" in said[0] and not (tmp_path / "run").exists()
