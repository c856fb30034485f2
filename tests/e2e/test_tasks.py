"""The verb tasks with lm-evaluation-harness itself, offline, on a task file with data of PIQA's
form. The arithmetic is tested without the harness in tests/unit/evaluate.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megamask.errors import ArtifactError
from tests.e2e.conftest import WORDS
from tests.e2e.program import here, in_process, refusal
from tests.e2e.ranks import run_program

NEEDS = "needs the extra eval: pip install -c constraints.txt -e '.[eval]'"
needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason=NEEDS)
Settings = Callable[[Path], list[str]]
TASK = """\
task: little_piqa
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "Question: {{{{goal}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
ROLLING = """\
task: little_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{goal}}}}"
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
metadata: {{version: 1.0}}
"""
GENERATES = """\
task: little_story
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{goal}}}}"
doc_to_target: "{{{{sol1}}}}"
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
BROKEN = TASK.replace("little_piqa", "little_gone").replace("{data}", "{data}.absent")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files, and data of PIQA's form."""
    made, choose = tmp_path_factory.mktemp("tasks"), random.Random(0)
    rows = [
        {
            "goal": " ".join(choose.choices(WORDS, k=choose.randint(3, 40))),
            **{
                key: " ".join(choose.choices(WORDS, k=choose.randint(1, 9)))
                for key in ("sol1", "sol2")
            },
            "label": choose.randint(0, 1),
        }
        for _ in range(40)
    ]
    data = made / "data" / "piqa.jsonl"
    data.parent.mkdir()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in {"a": TASK, "b": ROLLING, "c": GENERATES, "d": BROKEN}.items():
        (made / f"{name}.yaml").write_text(text.format(data=data))
    return made


def plain_accuracy(hf: Path, data: Path) -> tuple[float, float]:
    """Accuracies of PIQA's rule in plain transformers, one answer at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(hf)
    right, right_norm, rows = 0, 0, [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        context = f"Question: {row['goal']}\nAnswer:"
        known = tokenizer(context, add_special_tokens=False)["input_ids"]
        scores = []
        for answer in (row["sol1"], row["sol2"]):
            ids = tokenizer(f"{context} {answer}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            scores.append(sum(float(logits[at - 1, ids[at]]) for at in range(len(known), len(ids))))
        lengths = [len(row[key]) for key in ("sol1", "sol2")]
        normed = [score / length for score, length in zip(scores, lengths, strict=True)]
        right += (scores[1] > scores[0]) == bool(row["label"])
        right_norm += (normed[1] > normed[0]) == bool(row["label"])
    return right / len(rows), right_norm / len(rows)


@needs_harness
@pytest.mark.nightly
@pytest.mark.slow
def test_a_local_task_on_both_paths(
    prepared: Path, model: Path, settings: Settings, folder: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(prepared, tmp_path / "run"))
    words = [*settings(run_dir), f"tasks.include={folder}"]
    both = "tasks.names=[little_piqa, little_text]"
    said = here("tasks", *words, both, "evaluate.masks={magnitude: magnitude}").stdout
    results = json.loads((run_dir / "tasks.json").read_text())
    assert list(results["tasks"]) == ["dense", "magnitude"] and "| dense" in said
    assert (run_dir / "tasks.md").read_text().strip() in said
    assert results["protocol"]["documents"]["little_piqa"] == 40
    assert results["protocol"]["program"] == "Megatron-Core"

    # Two ranks that share each layer, then two replicas: the same answers.
    for tp in (2, 1):
        given = [*words, both, "evaluate.masks={magnitude: magnitude}", f"parallel.tp={tp}"]
        ranks = run_program("tasks", *given)
        assert [one.code for one in ranks] == [0, 0] and not ranks[1].stdout, ranks
        spread = json.loads((run_dir / "tasks.json").read_text())["tasks"]
        for row, found in spread.items():
            assert found["little_piqa"] == results["tasks"][row]["little_piqa"]
            assert found["little_text"] == pytest.approx(results["tasks"][row]["little_text"], 1e-3)

    here("export", *settings(run_dir), "export.mask=magnitude")
    exported = run_dir / "export"
    for row, hf in {"dense": model, "magnitude": exported}.items():
        found = results["tasks"][row]["little_piqa"]
        assert (found["acc"], found["acc_norm"]) == plain_accuracy(hf, folder / "data/piqa.jsonl")
    here("tasks", *words, both, f"tasks.folder={exported}")
    again = json.loads((run_dir / "tasks.json").read_text())
    assert list(again["tasks"]) == ["dense", "export"]
    assert again["protocol"]["program"] == "transformers"
    assert again["masks"] == {"export": results["masks"]["magnitude"]}
    for ours, theirs in (("dense", "dense"), ("magnitude", "export")):
        assert again["tasks"][theirs]["little_piqa"] == results["tasks"][ours]["little_piqa"]
        one, other = (
            found["little_text"]["word_perplexity"]
            for found in (again["tasks"][theirs], results["tasks"][ours])
        )
        assert one == pytest.approx(other, rel=1e-3)  # fp32, of losses of some 30 a word
    rows = results["tasks"]
    assert rows["dense"]["little_text"] != rows["magnitude"]["little_text"]


@needs_harness
@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tasks.names=[little_piqua]"], "tasks.names = 'little_piqua': tasks of lm-evaluation-h"),
        (["tasks.names=[little_story]"], "this task generates text (generate_until)"),
        (["tasks.names=[little_gone]"], "a task whose data can be read"),
        (["tasks.include=/absent"], "tasks.include = '/absent': a folder with task files"),
    ],
)
def test_tasks_that_cannot_be_scored_are_refused_before_the_model_is_loaded(
    words: list[str], says: str, prepared: Path, settings: Settings, folder: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(prepared, tmp_path / "run"))
    (run_dir / "weights" / "metadata.json").unlink()  # loading would say this
    done = in_process("tasks", *settings(run_dir), f"tasks.include={folder}", *words)
    assert says in refusal(done)
    assert not (run_dir / "tasks.json").exists()


@needs_harness
@pytest.mark.nightly
def test_ids_that_the_model_does_not_know_are_refused_where_a_text_has_them() -> None:
    """Tokenizers of text models may have more ids than the model: Gemma 3's has images."""
    from megamask.data.tokenizer import TextTokenizer
    from megamask.evaluate.harness import HarnessModel

    tokenizer = TextTokenizer(
        name="ours",
        vocab_size=300,
        eod=2,
        bos=1,
        fingerprint="",
        encode_batch=lambda texts: [[ord(one) for one in text] for text in texts],
        model_vocab=ord("{"),
    )
    scorer: Any = None
    model = HarnessModel(scorer, tokenizer, [1])
    assert model.tok_encode("az") == [1, 97, 122]
    assert model.tok_encode("", add_special_tokens=False) == []
    with pytest.raises(ArtifactError, match="ours: gives the token id 123"):
        model.tok_encode("a{")


def test_the_missing_package_is_named_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megamask.verbs import tasks

    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    said = refusal(in_process("tasks", f"run_dir={tmp_path / 'run'}"))
    assert "lm-eval, which is not installed" in said and "pip install" in said
