"""What a user can get wrong: one message with key or path, value, what is allowed and the fix;
soon, and nothing is lost.

Refusals happen inside the process, so most tests call the program without starting one. ``EARLY``
are refused before any artefact is read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megamask import load_masks, save_masks
from tests.e2e.conftest import save_tokenizer
from tests.e2e.program import (
    assert_untouched,
    command,
    contents,
    here,
    in_process,
    megamask,
    refusal,
)
from tests.e2e.ranks import run_program

pytestmark = pytest.mark.slow

Settings = Callable[[Path], list[str]]
Refuse = Callable[..., str]


@pytest.fixture
def refused(run_dir: Path, settings: Settings) -> Refuse:
    """``refused(verb, *overrides, says=[...])``: the verb refuses in these words and leaves the run
    folder as it was.
    """

    def check(verb: str, *overrides: str, says: list[str]) -> str:
        before = contents(run_dir)
        message = refusal(in_process(verb, *settings(run_dir), *overrides))
        assert [words for words in says if words not in message] == [], message
        assert_untouched(run_dir, before)
        return message

    return check


CATEGORICAL = "learn.method=categorical"
EARLY = {
    "unknown key": (
        "learn",
        "learn.stepz=3",
        ["learn.stepz = 3", "no such setting", "Did you mean learn.steps?"],
    ),
    "negative blend": (
        "learn",
        "data.blend={prose: -1, code: 2}",
        ["data.blend.prose = -1", "number from 0 to 1e+06", "Correct it"],
    ),
    "domain without a kind": (
        "tokenize",
        "data.domains.more={path: x}",
        ["data.domains.more.kind = None: one of stdlib, pydocs, text, jsonl", "Give it in the"],
    ),
    "blend of nothing": (
        "learn",
        "data.blend={prose: 0, code: 0}",
        ["data.blend = ", "at least one weight above 0", "a positive weight"],
    ),
    "blend while tokenizing": (
        "tokenize",
        "data.blend={prose: -1, code: 2}",
        ["data.blend.prose = -1"],
    ),
    "world and tp": (
        "learn",
        "parallel.tp=2",
        ["parallel.tp = 2", "must divide the number of processes, here 1", "torchrun"],
    ),
    "world and tp, evaluate": (
        "evaluate",
        "parallel.tp=2",
        ["parallel.tp = 2", "must divide the number of processes, here 1"],
    ),
    "world and tp, prune": (
        "prune",
        "parallel.tp=2",
        ["parallel.tp = 2", "must divide the number of processes, here 1"],
    ),
    "long warm-up": (
        "learn",
        "learn.optimizer.warmup_steps=4",
        ["learn.optimizer.warmup_steps = 4", "below learn.steps, here 4"],
    ),
    "rising rate": (
        "learn",
        "learn.optimizer.min_lr=1",
        ["learn.optimizer.min_lr = 1.0", "at most learn.optimizer.lr", "Lower it"],
    ),
    "as many as there are": (
        "learn",
        "pattern=4:4",
        ["pattern = '4:4'", "0 < N < M", "pattern=2:4"],
    ),
    "none kept": ("learn", "pattern=0:4", ["pattern = '0:4'", "0 < N < M", "pattern=2:4"]),
    "no pattern": ("prune", "pattern=4:2", ["pattern = '4:2'", "0 < N < M", "pattern=2:4"]),
    "too many of too many": (
        "learn",
        f"pattern=32:64 {CATEGORICAL}",
        ["pattern = '32:64'", "256 candidates", "subset", "M up to 32"],
    ),
    "many candidates": (
        "learn",
        f"pattern=8:16 {CATEGORICAL}",
        ["pattern = '8:16'", "256 candidates", "12,870", "method=subset"],
    ),
    "too many members": (
        "learn",
        "pattern=32:64 learn.method=subset",
        ["pattern = '32:64'", "subset takes M up to 32", "M <= 32"],
    ),
    "negative tau": (
        "learn",
        "learn.sampling.tau=[4,-0.5]",
        ["learn.sampling.tau = -0.5", "number from 1e-09", "Correct it"],
    ),
    "tau without end": (
        "learn",
        "learn.sampling.tau=[.inf,1]",
        ["learn.sampling.tau = inf", "number from 1e-09", "Correct it"],
    ),
    "tau that is no number": (
        "learn",
        "learn.sampling.tau=[.nan,1]",
        ["learn.sampling.tau = nan", "number from 1e-09", "Correct it"],
    ),
    "falling kappa": (
        "learn",
        "learn.sampling.kappa=[500,100]",
        ["kappa = [500.0, 100.0]", "grows or stays", "smaller number first"],
    ),
    "kappa of zero": (
        "learn",
        "learn.sampling.kappa=[0,0]",
        ["learn.sampling.kappa = [0.0, 0.0]", "end above 0", "[100, 500]"],
    ),
    "diff of nothing": ("diff", "", ["A = None", "mask, named as", "Write megamask diff"]),
    "diff of one": (
        "diff",
        "a.safetensors",
        ["B = None", "the other mask", "Write megamask diff A B"],
    ),
    "diff of three": ("diff", "a b c", ["argument = 'c'", "diff takes A B", "Leave it out"]),
    "diff of a missing name": (
        "diff",
        "wanda sparsegpt",
        ["wanda.safetensors", "is missing", "This run has no masks yet"],
    ),
    "diff of a missing file": (
        "diff",
        "no/mask.safetensors wanda",
        ["no/mask.safetensors", "is missing", "Check the path"],
    ),
    "extract to nowhere": (
        "extract",
        "learn/snapshots",
        ["FILE = None", "mask file to write", "Write megamask extract"],
    ),
    "extract to no mask file": (
        "extract",
        "a b.bin",
        ["FILE = 'b.bin'", "ends in .safetensors", "Write megamask extract"],
    ),
    "tau of zero": (
        "learn",
        "learn.sampling.tau=[4, 0]",
        ["learn.sampling.tau", "number from 1e-09"],
    ),
    "rising tau": (
        "learn",
        "learn.sampling.tau=[1, 4]",
        ["learn.sampling.tau = [1.0, 4.0]", "a temperature that falls", "larger"],
    ),
    "heads and tp": (
        "convert",
        "parallel.tp=3",
        ["parallel.tp = 3", "num_attention_heads = 8", "allows 1, 2, 4, 8", "Set parallel.tp=8"],
    ),
}


@pytest.mark.parametrize("case", EARLY)
def test_settings_are_refused_before_anything_is_read(
    tmp_path: Path, settings: Settings, case: str
) -> None:
    verb, words, says = EARLY[case]
    overrides = words.split() if "{" not in words and "[" not in words else [words]
    run_dir = tmp_path / "nothing here yet"
    finished = in_process(verb, *settings(run_dir), *overrides)
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
    assert (
        "Point run_dir at a folder you can write" in message
        or "Point export.out at a folder you can write" in message
    )
    assert blocked.read_text() == "kept"


def test_a_missing_earlier_artefact_names_its_verb(tmp_path: Path, settings: Settings) -> None:
    for verb in ("prune", "learn", "evaluate", "sensitivity", "recover"):
        message = refusal(in_process(verb, *settings(tmp_path / "run")))
        assert "is missing" in message or "does not exist" in message
        assert "verb tokenize" in message or "verb convert" in message


def test_a_base_model_that_nobody_named(tmp_path: Path) -> None:
    run_dir = f"run_dir={tmp_path / 'run'}"
    message = refusal(command("import", str(tmp_path / "x.npz"), str(tmp_path / "m.safetensors")))
    assert "Name the base model: megamask import" in message and "--base" in message
    message = refusal(command("export", run_dir, "export.mask=dense"))
    assert "or name a Megatron checkpoint by model.megatron" in message


def test_a_picture_is_a_png(run_dir: Path, refused: Refuse) -> None:
    words = ["magnitude", "wanda", f"run_dir={run_dir}", "--picture"]
    message = refusal(command("diff", *words, str(run_dir / "p.svg")))
    assert "--picture" in message and "a PNG file. Name it FILE.png." in message


@pytest.mark.parametrize(
    ("verb", "file"),
    [
        ("learn", "train.bin"),
        ("learn", "train.idx"),
        ("prune", "train.bin"),
        ("evaluate", "heldout.bin"),
    ],
)
def test_a_truncated_shard(run_dir: Path, refused: Refuse, verb: str, file: str) -> None:
    shard = run_dir / "shards" / "prose" / file
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-2])
    (run_dir / "masks" / "wanda.safetensors").unlink()  # prune has something to do
    refused(
        verb,
        says=[
            str(shard),
            f"is truncated: {size - 2} bytes, {size} were written",
            "run the verb tokenize again",
        ],
    )


def test_torn_weights(run_dir: Path, refused: Refuse) -> None:
    for file in (run_dir / "weights").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    for verb in ("learn", "evaluate"):
        refused(
            verb,
            says=[
                str(run_dir / "weights"),
                "is torn or no checkpoint",
                "Run the verb convert again",
            ],
        )


def test_weights_that_lost_a_file_are_made_again(run_dir: Path, settings: Settings) -> None:
    """Their note stays, and tells the same model and settings."""
    for verb, folder in (("convert", "weights"), ("prune", "weights-sparsegpt_update")):
        file = min((run_dir / folder).glob("*.distcp"))
        before = file.read_bytes()
        file.unlink()
        assert "made again" in here(verb, *settings(run_dir)).stderr
        assert file.read_bytes() == before


def test_a_torn_prior(run_dir: Path, refused: Refuse) -> None:
    mask = run_dir / "masks" / "sparsegpt.safetensors"
    mask.write_bytes(mask.read_bytes()[:-10])
    refused(
        "learn",
        says=[str(mask), "is torn: it is a safetensors file of", "Make the mask file again"],
    )


def test_a_prior_with_a_flipped_bit_is_refused_before_weights_are_read(
    run_dir: Path, refused: Refuse
) -> None:
    mask = run_dir / "masks" / "sparsegpt.safetensors"
    written = bytearray(mask.read_bytes())
    written[-3] ^= 1
    mask.write_bytes(written)
    forget_weights(run_dir)
    refused(
        "learn",
        says=[str(mask), "is corrupt: the checksum does not match", "Make the mask file again"],
    )


def forget_weights(run_dir: Path) -> None:
    """Delete the tensors: a refusal that needs them would be another one."""
    for file in (run_dir / "weights").glob("*.distcp"):
        file.unlink()


PRIORS = {
    "a misspelt name": (
        "sparsgpt",
        ["masks/sparsgpt.safetensors", "is missing", "Did you mean sparsegpt?"],
    ),
    "a name of another run": (
        "mine",
        ["masks/mine.safetensors", "This run has magnitude, sparsegpt, sparsegpt_update, wanda"],
    ),
    "a path to nothing": (
        "{run}/mine.safetensors",
        ["mine.safetensors", "is missing", "a snapshot, or a folder of snapshots"],
    ),
    "another file": (
        "{run}/weights/config.json",
        ["config.json", "is not a mask file: it is a JSON text", "Make the mask file again"],
    ),
    "the mask that the run learns": ("learned", ["learn.prior.mask", "another run", "run_dir"]),
    "its best mask": ("{run}/masks/learned-best.safetensors", ["are replaced while it learns"]),
    "another folder": (
        "{run}/masks",
        ["masks: is a folder without snapshots", "RUN/learn/snapshots", "a mask file"],
    ),
    "a run": (
        "{general}",
        ["is a folder without snapshots", "Name ", "learn/snapshots, or a mask file"],
    ),
    "weights": ("{run}/weights/step-00000001", ["step-00000001", "is missing", "Check the path"]),
    "a part of the linears": (
        "{part}",
        ["part.safetensors: has no mask for model.layers.0.self_attn.q_proj and 1 more"],
    ),
}


@pytest.mark.parametrize("case", PRIORS)
def test_a_prior_that_cannot_serve(
    run_dir: Path, general: Path, tmp_path: Path, refused: Refuse, case: str
) -> None:
    masks, part = load_masks(run_dir / "masks" / "wanda.safetensors"), tmp_path / "part.safetensors"
    kept = {
        name: mask
        for name, mask in masks.items()
        if not name.endswith(("0.self_attn.q_proj", "1.mlp.up_proj"))
    }
    save_masks(part, kept, masks.pattern, fingerprint=masks.fingerprint, method="wanda")
    for name in ("learned", "learned-best") if "the run learns" in case or "best" in case else ():
        shutil.copy(part, run_dir / "masks" / f"{name}.safetensors")
    forget_weights(run_dir)
    prior, says = PRIORS[case]
    refused(
        "learn",
        f"learn.prior.mask={prior.format(run=run_dir, general=general, part=part)}",
        says=says,
    )


SNAPSHOT_TEARS = {
    "tensors cut": ("__0_0.distcp", True, "is torn or no checkpoint (__0_0.distcp has "),
    "tensors gone": ("__0_1.distcp", False, "is torn or no checkpoint (__0_1.distcp"),
    "index cut": (".metadata", True, "is torn or no checkpoint"),
    "index gone": (".metadata", False, "is torn or no checkpoint"),
    "note cut": ("megamask.json", True, "is torn or not a JSON text"),
    "note gone": ("megamask.json", False, "is missing"),
}


@pytest.mark.parametrize("case", SNAPSHOT_TEARS)
def test_a_torn_snapshot_as_a_prior(
    run_dir: Path, general: Path, tmp_path: Path, refused: Refuse, case: str
) -> None:
    folder = Path(shutil.copytree(general / "learn" / "snapshots", tmp_path / "snapshots"))
    name, is_cut, says = SNAPSHOT_TEARS[case]
    torn = folder / "step-00000004" / name
    half = torn.read_bytes()[: torn.stat().st_size // 2]
    torn.unlink()
    if is_cut:
        torn.write_bytes(half)
    forget_weights(run_dir)
    fix = f"Name another snapshot in {folder}, or a mask file of that run"
    refused("learn", f"learn.prior.mask={folder}", says=[str(folder / "step-00000004"), says, fix])


def test_a_snapshot_that_does_not_fit(
    run_dir: Path, general: Path, refused: Refuse, settings: Settings, other_model: Path
) -> None:
    prior = f"learn.prior.mask={general / 'learn' / 'snapshots'}"
    snapshot = str(general / "learn" / "snapshots" / "step-00000004")
    refused(
        "learn",
        prior,
        "pattern=1:4",
        says=[snapshot, "holds 2:4 masks, wanted 1:4", "Set pattern=2:4"],
    )
    other = f"model.hf={other_model}"
    assert in_process("convert", *settings(run_dir), other).code == 0
    says = [snapshot, "another base model", "Use the model that the mask"]
    refused("learn", prior, other, says=says)
    shape = run_dir / "weights" / "config.json"
    tiny = json.loads(shape.read_text())
    shape.write_text(json.dumps({**tiny, "intermediate_size": 256}))
    refused(
        "learn",
        prior,
        other,
        says=[snapshot, "mlp.linear_fc", "does not fit 512 x 64 weights", "learned on this model"],
    )
    shape.write_text(json.dumps({**tiny, "num_hidden_layers": 1}))
    refused(
        "learn",
        prior,
        other,
        says=[
            snapshot,
            "holds decoder.layers.1.",
            "which the model does not have",
            "learned on this model",
        ],
    )


def test_a_snapshot_of_the_same_run(general: Path, settings: Settings) -> None:
    before = contents(general)
    for folder in (
        general / "learn" / "snapshots",
        general / "learn" / "snapshots" / "step-00000002",
    ):
        message = refusal(in_process("learn", *settings(general), f"learn.prior.mask={folder}"))
        assert (
            "learn.prior.mask = " in message
            and "those that this run learns are replaced while it learns" in message
        ), message
        assert "Set another run_dir, or write it to a mask file first: megamask extract." in message
    assert_untouched(general, before)


def test_extract_and_evaluate_replace_nothing(run_dir: Path, refused: Refuse) -> None:
    mask = run_dir / "masks" / "wanda.safetensors"
    refused(
        "extract",
        "magnitude",
        str(mask),
        says=[str(mask), "a file that is not there yet", "Delete it, or choose another name"],
    )
    refused(
        "evaluate",
        "evaluate.masks={dense: wanda}",
        says=["evaluate.masks = 'dense'", "Name it otherwise"],
    )
    polished = run_dir / "masks" / "polished.safetensors"
    masks = load_masks(run_dir / "masks" / "wanda.safetensors")
    known = {"fingerprint": masks.fingerprint, "method": "wanda", "data": {"polish": 3}}
    save_masks(polished, dict(masks), "2:4", **known)
    refused(
        "evaluate",
        f"evaluate.masks={{wanda: {polished}, 'wanda, polished': magnitude}}",
        says=["names of different rows, and wanda and wanda, polished are both wanda, polished"],
    )


def test_another_base_model(
    run_dir: Path, refused: Refuse, settings: Settings, other_model: Path
) -> None:
    mask = run_dir / "masks" / "sparsegpt.safetensors"
    for verb in ("export", "inspect"):
        refused(
            verb,
            f"model.hf={other_model}",
            f"export.mask={mask}",
            says=[str(mask), "another base model", "Use the model that the mask"],
        )
    assert in_process("convert", *settings(run_dir), f"model.hf={other_model}").code == 0
    for verb in ("learn", "evaluate"):
        refused(
            verb,
            f"model.hf={other_model}",
            f"evaluate.masks={{row: {mask}}}",
            says=[str(mask), "another base model", "Use the model that the mask"],
        )


def test_another_pattern(run_dir: Path, refused: Refuse) -> None:
    mask = run_dir / "masks" / "sparsegpt.safetensors"
    refused(
        "learn", "pattern=1:4", says=[str(mask), "holds 2:4 masks, wanted 1:4", "Set pattern=2:4"]
    )
    refused(
        "export",
        "pattern=1:4",
        f"export.mask={mask}",
        says=[str(mask), "holds 2:4 masks, wanted 1:4", "Set pattern=2:4"],
    )
    for verb, words in (
        ("evaluate", ()),  # all masks of the run, which have the pattern of an earlier prune
        ("sensitivity", ()),
        ("recover", ("recover.mask=wanda", "recover.method=reconstruct")),
    ):
        allowed = ["Masks that evaluate.masks names"] if verb == "evaluate" else []
        says = ["holds 2:4 masks, wanted 1:4", "Set pattern=2:4", *allowed]
        refused(verb, "pattern=1:4", *words, says=says)


@pytest.mark.parametrize("verb", ["prune", "learn"])
def test_m_that_does_not_divide_a_row(run_dir: Path, refused: Refuse, verb: str) -> None:
    forget_weights(run_dir)
    says = [
        "pattern = '2:7'",
        "M must divide in_features of model.layers.0.",
        "here 64",
        "Choose another pattern",
    ]
    refused(verb, "pattern=2:7", "prune.block=126", "learn.prior.mask=null", says=says)


def test_m_that_does_not_divide_a_rank_s_part_of_a_row(run_dir: Path, settings: Settings) -> None:
    before, pattern = contents(run_dir), ("pattern=1:64", "prune.methods=[magnitude]")
    ranks = run_program("prune", *settings(run_dir), *pattern, "parallel.tp=2")
    assert all(one.code != 0 for one in ranks)
    said = [line for one in ranks for line in one.stderr.splitlines() if "error: " in line]
    assert len(said) >= 1  # the launcher ends the other rank as soon as the first has failed
    assert all(
        "pattern = '1:64'" in line and "here 32 after splitting over parallel.tp=2" in line
        for line in said
    ), ranks
    assert all("a smaller parallel.tp" in line for line in said)
    assert_untouched(run_dir, before)
    assert (
        in_process("prune", *settings(run_dir), *pattern).code == 0
    )  # whole rows hold one group of 64 or two


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_an_empty_corpus(tmp_path: Path, refused: Refuse, content: str) -> None:
    corpus = tmp_path / "empty.txt"
    corpus.write_text(content)
    says = [
        str(corpus),
        "holds no text. Give data.domains.prose a corpus with text",
        "Give data.domains.prose a corpus with text",
    ]
    refused("tokenize", f"data.domains.prose={{kind: text, path: {corpus}}}", says=says)


def test_another_tokenizer_than_that_of_the_shards(
    tmp_path: Path, model: Path, refused: Refuse
) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    save_tokenizer(other, vocab_size=400)
    for verb in ("learn", "evaluate"):
        refused(
            verb,
            f"data.tokenizer={other}",
            says=[
                "shards/",
                f"was made with the tokenizer {model}",
                str(other),
                "run the verb tokenize",
            ],
        )


@pytest.mark.parametrize("verb", ["prune", "learn", "evaluate"])
def test_a_tokenizer_with_more_ids_than_the_model(
    run_dir: Path, tmp_path: Path, model: Path, settings: Settings, refused: Refuse, verb: str
) -> None:
    large = tmp_path / "large"
    large.mkdir()
    save_tokenizer(large, vocab_size=700, reserved=300)
    refused(
        "tokenize",
        f"data.tokenizer={large}",
        says=["the model knows the 512 below", "tokenizer of the model"],
    )
    # shards that were made for a larger model
    config = json.loads((model / "config.json").read_text())
    (large / "config.json").write_text(json.dumps({**config, "vocab_size": 1000}))
    words = (f"data.tokenizer={large}", f"model.hf={large}")
    assert in_process("tokenize", *settings(run_dir), *words).code == 0
    refused(
        verb,
        f"data.tokenizer={large}",
        "calibration.seed=1",
        says=["shards/", "the model knows 512 ids", "tokenizer of the model"],
    )


def test_weights_that_are_pruned_already(
    run_dir: Path, tmp_path: Path, settings: Settings, refused: Refuse
) -> None:
    """The masked folder that export writes, taken for a dense model."""
    pruned = tmp_path / "pruned"
    mask = run_dir / "masks" / "magnitude.safetensors"
    assert (
        in_process("export", *settings(run_dir), f"export.mask={mask}", f"export.out={pruned}").code
        == 0
    )
    assert in_process("convert", *settings(run_dir), f"model.hf={pruned}").code == 0
    says = ["sparsegpt.safetensors", "another base model", "with its weights unpruned"]
    refused("learn", f"model.hf={pruned}", says=says)
    for verb in ("prune", "learn"):
        refused(
            verb,
            f"model.hf={pruned}",
            "learn.prior.mask=null",
            says=[
                str(run_dir / "weights"),
                "pruned already",
                "2:4 sparse",
                "Convert the dense model",
            ],
        )


def test_a_loss_that_is_not_finite(run_dir: Path, settings: Settings) -> None:
    """The largest rate with the largest decay makes logits that overflow when they are scaled: the
    snapshot before stays.
    """
    absurd = (
        *("learn.optimizer.lr=1e6", "learn.optimizer.weight_decay=1e6"),
        *("learn.sampling.kappa=[1e6,1e6]", "learn.sampling.tau=[1e-9,1e-9]"),
        *("learn.snapshot.every=1", "learn.snapshot.keep=1", "learn.optimizer.warmup_steps=0"),
    )
    message = refusal(in_process("learn", *settings(run_dir), *absurd))
    assert "step 4: the loss is nan" in message
    assert (
        "not finite. Lower learn.optimizer.lr or the scale learn.sampling.kappa; start again to "
        "go on from the last snapshot" in message
    )
    assert [path.name for path in (run_dir / "learn" / "snapshots").iterdir()] == ["step-00000003"]
    assert not (run_dir / "masks" / "learned.safetensors").exists()
    before = contents(run_dir / "learn" / "snapshots")
    assert "step 4: the loss is nan" in refusal(
        in_process("learn", *settings(run_dir), *absurd)
    )  # resumes, fails again
    assert contents(run_dir / "learn" / "snapshots") == before
    steps = [
        json.loads(line)["step"]
        for line in (run_dir / "learn" / "metrics.jsonl").read_text().splitlines()
    ]
    assert max(steps) == 3


@pytest.mark.parametrize(
    "key",
    [
        {"sliding_window": 64},
        {"hidden_act": "gelu"},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        {"surprise": 1},
    ],
    ids=lambda key: str(next(iter(key))),
)
def test_a_model_feature_that_is_not_built(
    tmp_path: Path, model: Path, refused: Refuse, key: dict[str, object]
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "odd"))
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps({**config, **key}))
    fix = "Point model.hf at a plain checkpoint of a supported family"
    if "surprise" in key:
        fix = "set model.ignore_keys=[surprise]"
    refused(
        "convert",
        f"model.hf={folder}",
        says=[f"config.json: {next(iter(key))}", fix],
    )


def test_a_process_ends_with_the_message_and_its_code(run_dir: Path, settings: Settings) -> None:
    """The same outside the test process; nothing but the message is said."""
    finished = megamask("learn", *settings(run_dir), "learn.stepz=3", fresh=True, check=False)
    assert refusal(finished) == finished.stderr.strip()
    assert finished.stdout == ""
