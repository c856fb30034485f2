"""The verb plan on the command line, and its memory against what a learning run takes."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megamask.__main__ import main
from megamask.learn.method import LOGITS, WEIGHTS
from megamask.plan.memory import EVALUATION, MASK_FILE, RESUME, SNAPSHOT, STEP
from tests.fork_server import ROOT, child_environment, fork_server

RECIPES = {
    "debug": "toy",
    "domains": "smollm2-135m",
    "quickstart": "smollm2-135m",
    "quickstart-gemma3": "gemma-3-270m",
    "maskllm-llama2-7b": "llama2-7b",
}
SHAPE = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "max_position_embeddings": 1024,
}


@dataclass(frozen=True)
class Answer:
    """What ``megamask plan`` said."""

    code: int
    stdout: str
    stderr: str


Ask = Callable[..., Answer]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """``ask("plan --model x", "more=words")`` inside this process; nothing is launched, so there is
    nothing to kill.
    """

    def call(line: str, *words: str) -> Answer:
        code = main([*line.split(), *words])
        said = capsys.readouterr()
        return Answer(code, said.out, said.err)

    return call


def test_flags_and_table(ask: Ask, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    done = ask("plan --model llama2-7b --pattern 2:4 --tp 8 --dp=8 --json", str(file))
    assert done.code == 0, done.stderr
    for words in (
        "6.476 B prunable",
        "TP 8 x DP 8",
        "256 x 4,096",
        "A100 80GB",
        "H200 141GB",
        "mask logits",
        "**sum: a learning step**",
        "sum: an evaluation",
        "GPU-hours",
        "not measured",
        "70%",
    ):
        assert words in done.stdout, words
    written = json.loads(file.read_text())
    assert written["prunable_weights"] == 6_476_005_376 and written["advice"] is None
    gpu = written["devices"]["H100 80GB"]
    assert gpu["fits"] and sum(gpu["memory_bytes"].values()) == pytest.approx(gpu["total_bytes"])
    assert sum(gpu["seconds"].values()) == pytest.approx(gpu["step_seconds"])
    assert gpu["gpu_hours"] == pytest.approx(gpu["step_seconds"] * 2000 * 64 / 3600)


def test_what_cannot_fit_ends_with_2_and_a_remedy_that_works(ask: Ask, tmp_path: Path) -> None:
    asked, file = "plan --model llama2-7b --tp 1 --dp 8 --gpu a100", tmp_path / "plan.json"
    done = ask(f"{asked} --json {file}")
    assert done.code == 2 and "**no**" in done.stdout
    message = done.stderr.strip()
    assert len(message.splitlines()) == 1 and "GiB of A100 80GB. The nearest that fits: " in message
    assert json.loads(file.read_text())["advice"] in message
    named = message.split("fits: ")[1].split(" (")[0].split()
    assert ask(asked, *named).code == 0


def test_a_search_lists_layouts_and_says_when_none_fits(ask: Ask, tmp_path: Path) -> None:
    asked, file = "plan --model smollm2-135m --search 2", tmp_path / "search.json"
    done = ask(f"{asked} --gpu h100 --json {file}")
    assert done.code == 0 and "not measured" in done.stdout, done.stderr
    rows = json.loads(file.read_text())["best"]
    assert rows and {(row["tp"], row["dp"]) for row in rows} == {(1, 2)}  # 9 heads
    assert all(row["overrides"] in done.stdout for row in rows)
    hours = [row["gpu_hours"] for row in rows if row["changes_masks"]]
    assert hours == sorted(hours) and not rows[0]["changes_masks"]
    # the ranks of a CPU share its cores: two of them are no faster than one
    seconds = []
    for ranks in (1, 2):
        assert ask(f"{asked[:-1]}{ranks} --gpu cpu --json {file}").code == 0
        rows = json.loads(file.read_text())["best"]
        seconds.append(min(row["step_seconds"] for row in rows))
    assert seconds[1] > 0.95 * seconds[0]
    refused = ask("plan --model llama3-70b --gpu a100-40 --search=1")
    assert refused.code == 2 and not refused.stdout
    assert "The smallest, TP 1 x DP 1 with parallel.tp=1 " in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert "--dp = 2: is chosen by --search" in ask(f"{asked} --dp 2").stderr
    assert "--search = '0': a whole number from 1" in ask("plan --search 0").stderr


def test_without_a_gpu_of_choice_any_may_hold_it(ask: Ask) -> None:
    assert ask("plan --model llama3-8b --tp 2 --dp 4").code == 0  # an H200 does
    refused = ask("plan --model llama3-8b")
    assert refused.code == 2 and "GiB of H200 141GB" in refused.stderr


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("plan run_dir=no/such", "--model"),
        ("plan --model llama9", "llama2-7b"),
        ("plan --model llama2-7b --gpu b200", "--gpu = 'b200'"),
        ("plan --model llama2-7b --memory tiny", "learn.memory"),
        ("plan --model llama2-7b --node 3", "--global-batch"),
        ("plan --model", "needs a value"),
        ("plan --model llama2-7b --tp 3", "parallel.tp = 3"),
        ("plan model.hf=no/such", "no/such"),
        ("learn --tp 2", "--config FILE"),
    ],
)
def test_a_wrong_question(ask: Ask, line: str, says: str) -> None:
    done = ask(line)
    assert done.code == 2 and says in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "configs" / "recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_recipe_can_be_planned(ask: Ask, recipe: Path) -> None:
    done = ask(f"plan --config {recipe} --model {RECIPES[recipe.stem]}")
    assert done.code == 0, done.stderr


def test_the_model_of_the_run_is_found(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(SHAPE))
    done = ask(f"plan run_dir={tmp_path} --gpu cpu")
    assert done.code == 0 and "CPU, " in done.stdout and "CUDA" not in done.stdout, done.stderr
    assert "4 x 256 tokens" in done.stdout  # the run's own batch, not the paper's


LINEARS = 16
CASES = {
    "default": [],
    "recompute": ["parallel.recompute=true", "learn.memory=leanest"],
    "mlp": ["parallel.recompute=mlp"],
    "mlp, regenerate": ["parallel.recompute=mlp", "learn.memory=leanest"],
    "one draw": ["learn.sampling.draws=step", "dtype=fp32"],
}
if os.environ.get("NIGHTLY") == "1":
    CASES |= {"regenerate": ["learn.state.masked_weight=regenerate"]}  # as "mlp, regenerate"


MOMENTS = {"default": ["--moments"], "mlp, regenerate": ["--moments"]}
PEAK = "peak of "


def measure(runs: list[list[str]]) -> int:
    """``benchmarks.plan`` with each command line in turn; the largest exit code."""
    from benchmarks.plan import main as compare

    return max([compare(words) for words in runs])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """``benchmarks.plan`` of every case, in one process of its own: 11.8 M prunable weights, 512
    tokens.
    """
    folder = tmp_path_factory.mktemp("plan")
    (folder / "config.json").write_text(json.dumps(SHAPE))
    known = [
        "--device",
        "cpu",
        "--threads",
        "1",
        "--rounds",
        "0",
        "--model",
        str(folder / "config.json"),
        "--micro",
        "2",
    ]
    runs = [
        [*known, *MOMENTS.get(name, []), "--json", str(folder / f"{name}.json"), *settings]
        # Megatron's writer and reader keep some tensors, so cases with snapshots come last.
        for name, settings in sorted(CASES.items(), key=lambda case: case[0] in MOMENTS)
    ]
    environment = child_environment()
    with tempfile.TemporaryFile("w+") as said:
        child = fork_server(environment).call(
            f"{__name__}:measure", runs,
            stdout=said, stderr=said, environment=environment, cwd=ROOT,
        )  # fmt: skip
        code = child.wait(300)
        child.close()
        said.seek(0)
        assert code == 0, said.read()[-3000:]
    return {
        name: json.loads((folder / f"{name}.json").read_text())["figures"]["bytes"]
        for name in CASES
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_planned_memory_is_what_a_step_takes(
    measured: dict[str, dict[str, Any]], case: str
) -> None:
    parts = {
        part: (one["predicted"], one["measured"])
        for part, one in measured[case].items()
        if not part.startswith(PEAK) or part.endswith(STEP)
    }
    planned_peak, peak = parts.pop(PEAK + STEP)
    planned_rest, rest = parts.pop("all other tensors")
    assert all(abs(planned - held) <= 4 * LINEARS for planned, held in parts.values()), (
        parts
    )  # state is counted: AdamW's counters remain
    # A rotary table and counters are left out; Megatron caches the tables of an evaluation too.
    assert planned_rest == pytest.approx(rest, rel=0.05 if case in MOMENTS else 0.02)
    assert planned_peak == pytest.approx(peak, rel=0.05)  # promised: 10 %; seen: 1 %
    state = sum(held for _, held in parts.values()) + rest
    assert planned_peak - state == pytest.approx(
        peak - state, rel=0.15
    )  # the part of it that a step makes; seen: up to 8 %
    assert planned_peak - state != pytest.approx(1.5 * (peak - state), rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("case", MOMENTS)
@pytest.mark.parametrize("moment", [EVALUATION, MASK_FILE, SNAPSHOT, RESUME])
def test_planned_memory_is_what_every_other_moment_takes(
    measured: dict[str, dict[str, Any]], case: str, moment: str
) -> None:
    """Before, an evaluation made a masked weight of every linear, and a resume joined the halves of
    [gate; up] in new memory: 2 bytes a weight and nearly half of a snapshot more.
    """
    found = measured[case][PEAK + moment]
    planned, peak = found["predicted"], found["measured"]
    assert planned == pytest.approx(peak, rel=0.05)  # promised: 10 %; seen: up to 3 %
    weights = measured[case][WEIGHTS]["measured"]
    if moment == EVALUATION:
        assert planned + weights != pytest.approx(peak, rel=0.05)
    if moment == RESUME:
        logits = measured[case][LOGITS]["measured"]
        assert planned + 0.45 * 2 * logits != pytest.approx(peak, rel=0.05)
