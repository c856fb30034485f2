"""Which tokens are targets when lm-evaluation-harness asks, against plain passes of the model."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from megamask.config.tasks_tree import TasksSection
from megamask.data.tokenizer import TextTokenizer
from megamask.evaluate.loglikelihood import transformers_score
from tests.unit.evaluate.test_loglikelihood import LONGEST, SAME, scorer, tiny_llama
from tests.unit.learn.one_rank import VOCAB

NEEDS = "needs the extra eval: pip install -c constraints.txt -e '.[eval]'"
pytestmark = [pytest.mark.nightly, pytest.mark.skipif(find_spec("lm_eval") is None, reason=NEEDS)]
BOS = 1
# Shorter than the positions, as long, and longer by a part of a window and by whole windows.
TEXTS = [
    "".join(chr(97 + 7 * at % 26) for at in range(length))
    for length in (1, 5, LONGEST, LONGEST + 5, 3 * LONGEST)
]


def asked(*arguments: str) -> Any:
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", doc={}, arguments=arguments, idx=0)


def made(model: Any, begin: list[int]) -> Any:
    """The model as the harness calls it. A letter is a token."""
    from megamask.evaluate.harness import HarnessModel

    tokenizer = TextTokenizer(
        name="letters",
        vocab_size=VOCAB,
        eod=2,
        bos=BOS,
        fingerprint="",
        encode_batch=lambda texts: [[ord(one) for one in text] for text in texts],
    )
    return HarnessModel(scorer(transformers_score(model)), tokenizer, begin)


@pytest.mark.parametrize(
    ("bos", "eos", "eod", "expected"),
    [(1, 2, 3, 1), (None, 2, 3, 2), (None, 2, None, 2), (None, None, 3, 3), (0, 2, 3, 0)],
)
def test_the_token_of_an_empty_context_is_that_of_the_harness(
    bos: int | None, eos: int | None, eod: int | None, expected: int
) -> None:
    """``data.eod=null`` says nothing of the tokenizer's own EOS."""
    from megamask.evaluate.harness import HarnessModel

    tokenizer = TextTokenizer("t", VOCAB, eod, bos, "", lambda texts: [], eos=eos)
    nothing: Any = None
    assert HarnessModel(nothing, tokenizer, []).eot_token_id == expected


@torch.no_grad()
def plainly(model: Any, text: str) -> float:
    """The log-likelihood of the letters, and of nothing else, after a BOS."""
    stream, total = [BOS, *map(ord, text)], 0.0
    for target in range(1, len(stream)):
        # Targets come in windows; the inputs of a window end before its last target.
        end = min(-(-target // LONGEST) * LONGEST, len(text))
        first = max(end - LONGEST, 0)
        logits_SV = model(torch.tensor([stream[first:end]])).logits[0].double()
        total += float(logits_SV[target - 1 - first].log_softmax(-1)[stream[target]])
    return total


@pytest.mark.parametrize("begin", [[BOS], []])
def test_the_token_before_a_text_is_never_a_target(begin: list[int]) -> None:
    model = tiny_llama()
    ours = made(model, begin)
    found = ours.loglikelihood_rolling([asked(text) for text in [*TEXTS, ""]])
    assert found == pytest.approx([*(plainly(model, text) for text in TEXTS), 0.0], abs=SAME * 5)
    with torch.no_grad():
        twice = float(model(torch.tensor([[BOS]])).logits[0, 0].log_softmax(-1)[BOS])
    assert abs(twice) > SAME * 50  # a BOS among the targets would be seen

    # Without a context, and with white space for a context, the BOS alone comes before the answer.
    pairs = [asked("", TEXTS[1]), asked(" ", TEXTS[1])]
    expected = [plainly(model, TEXTS[1]), plainly(model, f" {TEXTS[1]}")]
    assert [one for one, _ in ours.loglikelihood(pairs)] == pytest.approx(expected, abs=SAME)


TASK = """\
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {asked}, train: {examples}}}}}
output_type: multiple_choice
validation_split: validation
training_split: train
fewshot_split: train
doc_to_text: "Q: {{{{goal}}}} A:"
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
{more}
"""


def loaded(folder: Path, more: str = "", examples: str = "abcdefghij", shots: int = 2) -> Any:
    from megamask.evaluate.harness import load_tasks

    folder.mkdir()
    files = {"asked": folder / "asked.jsonl", "examples": folder / "examples.jsonl"}
    for file, goals in zip(files.values(), ("klmnop", examples), strict=True):
        rows = [{"goal": goal, "sol1": "x", "sol2": "y", "label": 1} for goal in goals]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "letters.yaml").write_text(TASK.format(more=more, **files))
    section = TasksSection(names=["letters"], include=str(folder), shots=shots, limit=4)
    return load_tasks(section)


def test_the_digest_is_of_all_that_is_asked(tmp_path: Path) -> None:
    """Also of description, delimiters and examples, which no document of the task holds."""
    changes: dict[str, dict[str, Any]] = {
        "same": {},
        "description": {"more": 'description: "Choose well."'},
        "target": {"more": 'target_delimiter: ""'},
        "fewshot": {"more": 'fewshot_delimiter: "; "'},
        "examples": {"examples": "qrstuvwxyz"},
        "shots": {"shots": 3},
    }
    found = {
        name: loaded(tmp_path / name, **change).facts()["documents_sha256"]["letters"]
        for name, change in changes.items()
    }
    assert len(set(found.values())) == len(changes), found
    again = loaded(tmp_path / "again").facts()["documents_sha256"]["letters"]
    assert again == found["same"]


def test_every_model_is_asked_the_same_examples(tmp_path: Path) -> None:
    tasks, asked_of = loaded(tmp_path / "a"), []

    class Recorder:
        def __call__(self, pairs: list[Any]) -> list[tuple[float, bool]]:
            asked_of.append(["".join(map(chr, known + ids)) for known, ids in pairs])
            return [(0.0, False)] * len(pairs)

    model = made(tiny_llama(), [])
    model.scorer = Recorder()
    for _ in ("dense", "masked"):
        tasks.run(model)
        tasks.facts()
    assert asked_of[0] == asked_of[1] and len(asked_of[0]) == 4 * 2
    assert len({text.rpartition("Q:")[0] for text in asked_of[0]}) > 1  # drawn for each document
    instances = tasks.found["tasks"]["letters"].instances
    assert asked_of[0] == ["".join(one.arguments) for one in instances]
