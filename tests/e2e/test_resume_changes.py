"""What a resumed run may change: settings that every step reads anew, with a record, and paths
whose content is the same. Another text, tokenizer, model or prior is refused.
"""

from __future__ import annotations

import html
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import megamask
from megamask.config.nested import nest
from megamask.config.paths import margins_path
from megamask.data.shards import read_shards
from megamask.masks.file import load_masks, save_masks
from megamask.masks.margins import save_margins
from tests.e2e.conftest import code, run_settings, save_tokenizer
from tests.e2e.program import assert_untouched, contents, here, in_process, refusal

pytestmark = pytest.mark.slow

STEPS = 4
RUN = (
    *(f"learn.steps={STEPS}", "learn.snapshot.every=2", "learn.micro_batch=2"),
    *("learn.global_batch=2", "data.seq_length=16", "learn.monitor.sinks=[]"),
)
Settings = Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def begun(prepared: Path, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learned its 4 steps."""
    run_dir = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("begun") / "run"))
    here("learn", *settings(run_dir), *RUN)
    return run_dir


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


def note_of(run_dir: Path, step: int) -> Path:
    return run_dir / "learn" / "snapshots" / f"step-{step:08d}" / "megamask.json"


def test_a_finished_run_goes_on_with_more_steps_and_says_so(
    run: Path, settings: Settings, model: Path
) -> None:
    words = [*settings(run), *RUN, "learn.steps=6", "learn.optimizer.lr=0.003"]
    done = here("learn", *words)
    assert "learn.optimizer.lr 0.02 -> 0.003 after step 4" in done.stderr
    assert "from step 4 on they are those of a run of 6 steps" in done.stderr
    lines = (run / "learn" / "metrics.jsonl").read_text().splitlines()
    trained = [one for one in map(json.loads, lines) if one["kind"] == "train"]
    assert [one["step"] for one in trained] == [1, 2, 3, 4, 5, 6]
    # the schedules are those of a run of 6 steps: step 5 (number 4) stands at progress 4 / 6
    first, last = 100.0, 500.0
    assert trained[4]["kappa"] == pytest.approx(first + (last - first) * 4 / 6, rel=1e-6)
    assert trained[3]["kappa"] == pytest.approx(first + (last - first) * 3 / 4, rel=1e-6)
    learned = megamask.load_masks(run / "masks" / "learned.safetensors")
    assert learned.meta["evaluation"]["step"] == 6
    text = read_shards(run / "shards" / "code").content_sha256("train")
    assert learned.meta["data"]["text_sha256"]["code"] == text
    record = learned.meta["data"]["changes"]
    assert [(one["setting"], one["before"], one["after"], one["step"]) for one in record] == [
        ("learn.optimizer.lr", 0.02, 0.003, 4),
        ("learn.steps", 4, 6, 4),
    ]
    assert json.loads((run / "learn" / "changes.json").read_text())["changes"] == record
    assert json.loads(note_of(run, 6).read_text())["changes"] == record
    shown = here("inspect", *words).stdout
    assert "changed          learn.steps 4 -> 6 after step 4" in shown
    here("report", *words)
    report = html.unescape((run / "report.html").read_text())
    assert '"setting": "learn.optimizer.lr", "before": 0.02, "after": 0.003' in report
    # what convert found of copies in fp16 reaches the mask, and fits the model as users hold it
    held = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16)
    assert learned.fingerprints[1:]
    megamask.apply_masks(held, run / "masks" / "learned.safetensors")
    # the same command again has nothing to do, and no change to tell
    again = here("learn", *words)
    assert "is there already, learned in 6 steps" in again.stderr and "->" not in again.stderr
    # a third life adds to the record
    here("learn", *words, "learn.steps=7", "learn.sampling.tau=[1, 0.2]")
    third = load_masks(run / "masks" / "learned.safetensors").meta["data"]["changes"]
    assert third[:2] == record and [one["step"] for one in third[2:]] == [6, 6]


def test_a_run_whose_loss_left_the_numbers_goes_on_at_a_lower_rate(
    prepared: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megamask.learn import gumbel

    run_dir = Path(shutil.copytree(prepared, tmp_path / "run"))
    words = [*settings(run_dir), *RUN, "learn.optimizer.lr=0.05"]
    step = gumbel.GradientLearner.step

    def overflowing(self: gumbel.GradientLearner, number: int, plan: object) -> object:
        """Logits that a high rate drove out of the numbers, at the third step."""
        if number == 2:
            for logits in self.masked_model.mask_logits:
                logits.data.fill_(float("nan"))
        return step(self, number, plan)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(gumbel.GradientLearner, "step", overflowing)
        failed = in_process("learn", *words)
    assert failed.code != 0 and "Lower learn.optimizer.lr" in failed.stderr
    done = here("learn", *words[:-1], "learn.optimizer.lr=0.01")
    assert "learn.optimizer.lr 0.05 -> 0.01 after step 2" in done.stderr


def test_a_finished_run_keeps_what_its_steps_were_learned_with(
    begun: Path, settings: Settings
) -> None:
    before = contents(begun)
    words = [*settings(begun), *RUN, "learn.optimizer.lr=0.003"]
    message = refusal(in_process("learn", *words))
    assert "all 4 steps were learned with 0.02" in message and "raise learn.steps" in message
    assert_untouched(begun, before)


def test_fewer_steps_end_the_run_where_it_stands(run: Path, settings: Settings) -> None:
    files = [run / "learn" / "config.yaml", run / "learn" / "versions.json"]
    before = [file.read_bytes() for file in files]
    (run / "masks" / "learned.safetensors").unlink()
    here("learn", *settings(run), *RUN, "learn.steps=3")
    learned = load_masks(run / "masks" / "learned.safetensors")
    assert learned.meta["evaluation"]["step"] == STEPS and "changes" not in learned.meta["data"]
    assert [file.read_bytes() for file in files] == before


def test_domains_in_another_order_are_other_samples(begun: Path, settings: Settings) -> None:
    words = settings(begun)
    prose, source = (word.partition("=")[2] for word in words if word.startswith("data.domains."))
    turned = f"data.domains={{code: {source}, prose: {prose}}}"
    message = refusal(in_process("learn", *words, *RUN, "learn.steps=6", turned))
    assert "was learned from prose, code" in message and "in this order" in message


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=7", "seed = 7"),
        ("pattern=1:4", "pattern"),
        ("learn.method=categorical", "learn.method = 'categorical'"),
        ("learn.state.logits=bf16", "learn.state.logits"),
        ("data.blend={prose: 1, code: 1}", "data.blend"),
        ("learn.global_batch=4", "learn.global_batch = 4"),
        ("learn.prior.mask=null", "learn.prior.mask = None"),
        ("model.exclude=[model.layers.0.*]", "model.exclude"),
    ],
)
def test_what_the_state_or_the_text_stands_on_may_not_change(
    begun: Path, settings: Settings, override: str, key: str
) -> None:
    before = contents(begun)
    message = refusal(in_process("learn", *settings(begun), *RUN, "learn.steps=6", override))
    assert key in message
    assert_untouched(begun, before)


def retokenized(run: Path, model: Path, folder: Path) -> list[str]:
    """The settings of a run whose corpus was replaced by other text under the same names."""
    corpus = folder / "corpus"
    (corpus / "prose").mkdir(parents=True)
    for number in range(40):
        (corpus / "prose" / f"{number:02d}.txt").write_text(code(500 + number))
    rows = [json.dumps({"text": code(number)}) + "\n" for number in range(40)]
    (corpus / "code.jsonl").write_text("".join(rows))
    words = run_settings(run, model, corpus)
    here("tokenize", *words)
    return words


def test_other_text_is_refused(run: Path, model: Path, tmp_path: Path) -> None:
    words = retokenized(run, model, tmp_path)
    for finished in (RUN, [*RUN, "learn.steps=6"]):  # a finished run too
        message = refusal(in_process("learn", *words, *finished))
        assert "shards/prose: holds other text than" in message and "Restore the corpus" in message


def test_another_tokenizer_is_refused(
    run: Path, settings: Settings, model: Path, tmp_path: Path
) -> None:
    save_tokenizer(tmp_path / "tokenizer", vocab_size=400)
    words = [*settings(run), f"data.tokenizer={tmp_path / 'tokenizer'}"]
    here("tokenize", *words)
    message = refusal(in_process("learn", *words, *RUN, "learn.steps=6"))
    assert "was made with another tokenizer" in message


def test_another_model_is_refused(run: Path, other_model: Path, settings: Settings) -> None:
    file = note_of(run, STEPS)
    note = json.loads(file.read_text())
    file.write_text(json.dumps({**note, "model_sha256": "0" * 64}))
    message = refusal(in_process("learn", *settings(run), *RUN, "learn.steps=6"))
    assert "another base model: other norms, embedding" in message
    file.write_text(json.dumps(note))
    words = [*settings(run), f"model.hf={other_model}"]
    here("convert", *words)
    here("prune", *words, "prune.methods=[magnitude,sparsegpt]")
    message = refusal(in_process("learn", *words, *RUN, "learn.steps=6"))
    assert "another base model" in message


def test_another_prior_of_the_same_name_is_refused(run: Path, settings: Settings) -> None:
    path = run / "masks" / "sparsegpt.safetensors"
    prior = load_masks(path)
    masks = {name: prior[name] for name in prior}
    first = next(iter(masks))
    masks[first] = masks[first].roll(4, dims=1)
    assert not torch.equal(masks[first], prior[first])
    save_masks(path, masks, prior.pattern, fingerprint=prior.fingerprint, method="sparsegpt")
    message = refusal(in_process("learn", *settings(run), *RUN, "learn.steps=6"))
    assert "sparsegpt.margins: belongs to other masks" in message
    margins = {name: torch.full(one.shape, 7, dtype=torch.uint8) for name, one in masks.items()}
    shapes = {name: tuple(one.shape) for name, one in masks.items()}
    digest = load_masks(path).content_sha256
    save_margins(margins_path(path), digest, shapes, margins.items())
    message = refusal(in_process("learn", *settings(run), *RUN, "learn.steps=6"))
    assert "learn.prior.mask" in message and "started from other masks" in message


def test_other_margins_of_the_prior_are_refused(run: Path, settings: Settings) -> None:
    path = run / "masks" / "sparsegpt.safetensors"
    prior = load_masks(path)
    margins = {name: torch.full(prior.shape(name), 7, dtype=torch.uint8) for name in prior}
    shapes = {name: prior.shape(name) for name in prior}
    save_margins(margins_path(path), prior.content_sha256, shapes, margins.items())
    message = refusal(in_process("learn", *settings(run), *RUN, "learn.steps=6"))
    assert "learn.prior.mask" in message and "started from other masks" in message


def test_moved_and_respelled_inputs_are_the_same_run(
    run: Path, model: Path, corpus: Path, tmp_path: Path
) -> None:
    """Everything is moved, each path is spelled in another way, and the prior is made again."""
    moved = Path(shutil.move(run, tmp_path / "elsewhere"))
    hf = Path(shutil.copytree(model, tmp_path / "model"))
    text = Path(shutil.copytree(corpus, tmp_path / "text"))
    (tmp_path / "link").symlink_to(hf)
    prior = load_masks(moved / "masks" / "sparsegpt.safetensors")
    save_masks(
        tmp_path / "prior.safetensors",
        prior,
        prior.pattern,
        fingerprint=prior.fingerprint,
        method="sparsegpt",
        data={"seconds": 3},
    )
    shutil.copy(moved / "masks" / "sparsegpt.margins", tmp_path / "prior.margins")
    words = [
        *run_settings(moved, tmp_path / "link", text),
        f"run_dir={os.path.relpath(moved)}//",
        f"data.tokenizer={tmp_path}/model/../model/",
        f"learn.prior.mask={tmp_path / 'prior.safetensors'}",
    ]
    here("tokenize", *words)  # a corpus at another place is tokenized again, to the same tokens
    here("learn", *words, *RUN, "learn.steps=5")
    assert load_masks(moved / "masks" / "learned.safetensors").meta["evaluation"]["step"] == 5


def test_notes_without_digests_compare_paths(
    run: Path, settings: Settings, model: Path, tmp_path: Path
) -> None:
    """The notes of version 0.1.0, which learned from text without BOS whatever the tokenizer is."""
    note = json.loads(note_of(run, STEPS).read_text())
    del note["content"], note["settings"]["data.bos"]
    note["settings"] = nest(note["settings"])
    note_of(run, STEPS).write_text(json.dumps(note))
    copied = shutil.copytree(model, tmp_path / "copied")
    words = [*settings(run), *RUN, "learn.steps=5"]
    message = refusal(in_process("learn", *words, f"data.tokenizer={copied}"))
    assert "data.tokenizer" in message and "was started with None" in message
    here("tokenize", *words, "data.bos=true")
    message = refusal(in_process("learn", *words, "data.bos=true"))
    assert "data.bos = True" in message and "was learned from prose without BOS" in message
    words.append("data.bos=false")
    here("tokenize", *words)
    here("learn", *words, f"model.hf={copied}/")  # the fingerprint of a model is in every note
