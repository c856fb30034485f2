"""What a user can get wrong: one message with key or path, value, what is allowed and the fix; soon, and nothing is lost.

Refusals happen inside the process, so most tests call the program without starting one. ``EARLY`` are refused before any artefact is read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import save_tokenizer
from tests.e2e.program import assert_untouched, contents, in_process, megamask, refusal

pytestmark = pytest.mark.slow

Settings = Callable[[Path], list[str]]
Refuse = Callable[..., str]


@pytest.fixture
def refused(run_dir: Path, settings: Settings) -> Refuse:
    """``refused(verb, *overrides, says=[...])``: the verb refuses in these words and leaves the run folder as it was."""

    def check(verb: str, *overrides: str, says: list[str]) -> str:
        before = contents(run_dir)
        message = refusal(in_process(verb, *settings(run_dir), *overrides))
        assert [words for words in says if words not in message] == [], message
        assert_untouched(run_dir, before)
        return message

    return check


EARLY = {
    "unknown key": ("learn", "learn.stepz=3", ["learn.stepz = 3", "no such setting", "Did you mean learn.steps?"]),
    "negative blend": ("learn", "data.blend={prose: -1, code: 2}", ["data.blend.prose = -1", "a finite weight of 0 or more", "Correct it"]),
    "blend of nothing": ("learn", "data.blend={prose: 0, code: 0}", ["data.blend = ", "at least one weight above 0", "a positive weight"]),
    "blend while tokenizing": ("tokenize", "data.blend={prose: -1, code: 2}", ["data.blend.prose = -1"]),
    "world and tp": ("learn", "parallel.tp=2", ["parallel.tp = 2", "must divide the number of processes, here 1", "torchrun"]),
    "world and tp, evaluate": ("evaluate", "parallel.tp=2", ["parallel.tp = 2", "must divide the number of processes, here 1"]),
    "world and tp, prune": ("prune", "parallel.tp=2", ["parallel.tp = 2", "must divide the number of processes, here 1"]),
    "long warm-up": ("learn", "learn.optimizer.warmup_steps=4", ["learn.optimizer.warmup_steps = 4", "below learn.steps, here 4"]),
    "rising rate": ("learn", "learn.optimizer.min_lr=1", ["learn.optimizer.min_lr = 1.0", "at most learn.optimizer.lr", "Lower it"]),
    "no pattern": ("prune", "pattern=4:2", ["pattern = '4:2'", "0 < N < M", "pattern=2:4"]),
    "too many candidates": ("learn", "pattern=8:16", ["pattern = '8:16'", "at most 256 candidates", "12,870", "learn.distribution=linear"]),
    "tau of zero": ("learn", "learn.sampling.tau=[4, 0]", ["learn.sampling.tau", "greater than 0"]),
    "rising tau": ("learn", "learn.sampling.tau=[1, 4]", ["learn.sampling.tau = [1.0, 4.0]", "a temperature that falls", "larger"]),
    "heads and tp": ("convert", "parallel.tp=3", ["parallel.tp = 3", "num_attention_heads = 8", "allows 1, 2, 4, 8", "Set parallel.tp=8"]),
}  # fmt: skip


@pytest.mark.parametrize("case", EARLY)
def test_settings_are_refused_before_anything_is_read(tmp_path: Path, settings: Settings, case: str) -> None:
    verb, override, says = EARLY[case]
    run_dir = tmp_path / "nothing here yet"
    finished = in_process(verb, *settings(run_dir), override)
    message = refusal(finished)
    assert [words for words in says if words not in message] == [], message
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("verb", ["convert", "tokenize", "prune", "learn", "evaluate", "export"])
def test_an_output_that_cannot_be_written(tmp_path: Path, settings: Settings, verb: str) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("kept")
    message = refusal(in_process(verb, *settings(blocked / "run")))
    assert str(blocked / "run") in message
    assert "cannot be written (Not a directory)" in message
    assert "Point run_dir at a folder you can write" in message or "Point export.out at a folder you can write" in message
    assert blocked.read_text() == "kept"


def test_a_missing_earlier_artefact_names_its_verb(tmp_path: Path, settings: Settings) -> None:
    for verb in ("prune", "learn", "evaluate"):
        message = refusal(in_process(verb, *settings(tmp_path / "run")))
        assert "is missing" in message or "does not exist" in message
        assert "verb tokenize" in message or "verb convert" in message


@pytest.mark.parametrize(
    ("verb", "file"), [("learn", "train.bin"), ("learn", "train.idx"), ("prune", "train.bin"), ("evaluate", "heldout.bin")]
)
def test_a_truncated_shard(run_dir: Path, refused: Refuse, verb: str, file: str) -> None:
    shard = run_dir / "shards" / "prose" / file
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-2])
    (run_dir / "masks" / "wanda.safetensors").unlink()  # prune has something to do
    refused(verb, says=[str(shard), f"is truncated: {size - 2} bytes, {size} were written", "run the verb tokenize again"])


def test_torn_weights(run_dir: Path, refused: Refuse) -> None:
    for file in (run_dir / "weights").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    for verb in ("learn", "evaluate"):
        refused(verb, says=[str(run_dir / "weights"), "cannot be read", "Run the verb convert again"])


def test_a_torn_prior(run_dir: Path, refused: Refuse) -> None:
    mask = run_dir / "masks" / "sparsegpt.safetensors"
    mask.write_bytes(mask.read_bytes()[:-10])
    refused("learn", says=[str(mask), "is torn or not a mask file", "Make the mask file again"])


def test_another_base_model(run_dir: Path, refused: Refuse, settings: Settings, other_model: Path) -> None:
    mask = run_dir / "masks" / "sparsegpt.safetensors"
    for verb in ("export", "inspect"):
        refused(
            verb, f"model.hf={other_model}", f"export.mask={mask}", says=[str(mask), "another base model", "Use the model that the mask"]
        )
    assert in_process("convert", *settings(run_dir), f"model.hf={other_model}").code == 0
    for verb in ("learn", "evaluate"):
        refused(verb, f"evaluate.masks={{row: {mask}}}", says=[str(mask), "another base model", "Use the model that the mask"])


def test_another_pattern(run_dir: Path, refused: Refuse) -> None:
    mask = run_dir / "masks" / "sparsegpt.safetensors"
    refused("learn", "pattern=1:4", says=[str(mask), "holds 2:4 masks, wanted 1:4", "Set pattern=2:4"])
    refused("export", "pattern=1:4", f"export.mask={mask}", says=[str(mask), "holds 2:4 masks, wanted 1:4", "Set pattern=2:4"])


@pytest.mark.parametrize("verb", ["prune", "learn"])
def test_m_that_does_not_divide_a_row(run_dir: Path, refused: Refuse, verb: str) -> None:
    for file in (run_dir / "weights").glob("*.distcp"):
        file.unlink()  # the refusal comes before the weights are read
    says = ["pattern = '2:7'", "M must divide in_features of decoder.layers.0.", "here 64", "Choose another pattern"]
    refused(verb, "pattern=2:7", "prune.block=126", "learn.prior.mask=null", says=says)


def test_m_that_does_not_divide_a_rank_s_part_of_a_row(run_dir: Path, settings: Settings) -> None:
    before, pattern = contents(run_dir), ("pattern=1:64", "prune.methods=[magnitude]")
    finished = megamask("prune", *settings(run_dir), *pattern, "parallel.tp=2", launch=2, check=False)
    assert finished.code != 0
    said = [line for line in finished.stderr.splitlines() if "megamask: error" in line]
    assert len(said) >= 1  # torchrun ends the other rank as soon as the first has failed
    assert all("pattern = '1:64'" in line and "here 32 after splitting over parallel.tp=2" in line for line in said), finished.stderr
    assert all("a smaller parallel.tp" in line for line in said)
    assert_untouched(run_dir, before)
    assert in_process("prune", *settings(run_dir), *pattern).code == 0  # whole rows hold one group of 64 or two


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_an_empty_corpus(tmp_path: Path, refused: Refuse, content: str) -> None:
    corpus = tmp_path / "empty.txt"
    corpus.write_text(content)
    says = [str(corpus), "holds no text (data.domains.prose)", "Give data.domains.prose a corpus with text"]
    refused("tokenize", f"data.domains.prose={{kind: text, path: {corpus}}}", says=says)


def test_another_tokenizer_than_that_of_the_shards(tmp_path: Path, model: Path, refused: Refuse) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    save_tokenizer(other, vocab_size=400)
    for verb in ("learn", "evaluate"):
        refused(
            verb, f"data.tokenizer={other}", says=["shards/", f"was made with the tokenizer {model}", str(other), "run the verb tokenize"]
        )


@pytest.mark.parametrize("verb", ["prune", "learn", "evaluate"])
def test_a_tokenizer_with_more_ids_than_the_model(run_dir: Path, tmp_path: Path, settings: Settings, refused: Refuse, verb: str) -> None:
    large = tmp_path / "large"
    large.mkdir()
    save_tokenizer(large, vocab_size=700, reserved=300)
    assert in_process("tokenize", *settings(run_dir), f"data.tokenizer={large}").code == 0
    refused(verb, f"data.tokenizer={large}", "calibration.seed=1", says=["shards/", "the model knows 512 ids", "tokenizer of the model"])


def test_weights_that_are_pruned_already(run_dir: Path, tmp_path: Path, settings: Settings, refused: Refuse) -> None:
    """The masked folder that export writes, taken for a dense model."""
    pruned = tmp_path / "pruned"
    mask = run_dir / "masks" / "magnitude.safetensors"
    assert in_process("export", *settings(run_dir), f"export.mask={mask}", f"export.out={pruned}").code == 0
    assert in_process("convert", *settings(run_dir), f"model.hf={pruned}").code == 0
    refused("learn", says=["sparsegpt.safetensors", "another base model", "with its weights unpruned"])
    for verb in ("prune", "learn"):
        refused(verb, "learn.prior.mask=null", says=[str(run_dir / "weights"), "pruned already", "2:4 sparse", "Convert the dense model"])


def test_a_loss_that_is_not_finite(run_dir: Path, settings: Settings) -> None:
    """A step of 1e38 makes logits that overflow in the next forward pass: the snapshot before it stays."""
    absurd = ("learn.optimizer.lr=1e38", "learn.snapshot.every=1")
    message = refusal(in_process("learn", *settings(run_dir), *absurd))
    assert "step 2: the loss is nan" in message
    assert "not finite. Lower learn.optimizer.lr or the scale learn.sampling.kappa; start again to go on from the last snapshot" in message
    assert [path.name for path in (run_dir / "learn" / "snapshots").iterdir()] == ["step-00000001"]
    assert not (run_dir / "masks" / "learned.safetensors").exists()
    before = contents(run_dir / "learn" / "snapshots")
    assert "step 2: the loss is nan" in refusal(in_process("learn", *settings(run_dir), *absurd))  # resumes, fails again
    assert contents(run_dir / "learn" / "snapshots") == before
    steps = [json.loads(line)["step"] for line in (run_dir / "learn" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 1


@pytest.mark.parametrize(
    "key", [{"sliding_window": 64}, {"hidden_act": "gelu"}, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, {"surprise": 1}]
)
def test_a_model_feature_that_is_not_built(tmp_path: Path, model: Path, refused: Refuse, key: dict[str, object]) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "odd"))
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps({**config, **key}))
    refused("convert", f"model.hf={folder}", says=[f"config.json: {next(iter(key))}", "Point model.hf at a plain Llama checkpoint"])


def test_a_process_ends_with_the_message_and_its_code(run_dir: Path, settings: Settings) -> None:
    """The same outside the test process; nothing but the message is said."""
    finished = megamask("learn", *settings(run_dir), "learn.stepz=3", check=False)
    assert refusal(finished) == finished.stderr.strip()
    assert finished.stdout == ""
