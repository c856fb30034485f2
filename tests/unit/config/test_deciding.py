"""One truth for what decides an artefact: snapshots and the quickstart's stages read the same."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megamask import pipeline
from megamask.config import load_config, run_paths
from megamask.config.deciding import (
    CONVERT,
    EVALUATE,
    GGUF,
    LEARN,
    PRUNE,
    TOKENIZE,
    changes,
    deciding_settings,
)
from megamask.config.legacy import upgrade_note
from megamask.errors import ConfigError

FREE_OF_LEARNING = [
    "run_dir=runs/other",
    "device=cpu",
    "parallel.tp=2",
    "evaluate.window=64",
    "learn.preset=best",
    "learn.resume=false",
    "learn.micro_batch=2",
    "learn.snapshot.every=7",
    "learn.monitor.sinks=[]",
    "learn.sampling.backend=torch",
    "learn.state.masked_weight=regenerate",
    "learn.state.track_flips=false",
    "learn.optimizer.distributed=true",
    "data.domains.code.kind=stdlib",
]
WITHOUT_EFFECT = ["learn.maskpro.lr=3", "learn.distillation.top_k=5"]
DECIDES = [
    ("learn.sampling.kappa=[1, 2]", "learn.sampling.kappa", [100.0, 500.0], [1.0, 2.0]),
    ("learn.memory=lean", "learn.state.grads", "fp32", "bf16"),
    ("seed=7", "seed", 1234, 7),
    ("data.blend={code: 2}", "data.blend.code", None, 2.0),
    ("data.eod=null", "data.eod", "auto", None),
    ("learn.weight_norm=[0, 0]", "learn.weight_norm", [1e-5, 0.0], [0.0, 0.0]),
]


@pytest.mark.parametrize("word", FREE_OF_LEARNING)
def test_free_settings_change_nothing(word: str) -> None:
    assert changes(deciding_settings(load_config(), LEARN), load_config(None, [word]), LEARN) == {}


@pytest.mark.parametrize(("word", "key", "before", "now"), DECIDES)
def test_deciding_settings_are_named(word: str, key: str, before: object, now: object) -> None:
    found = changes(deciding_settings(load_config(), LEARN), load_config(None, [word]), LEARN)
    assert found[key] == (before, now)
    back = changes(deciding_settings(load_config(None, [word]), LEARN), load_config(), LEARN)
    assert back[key] == (now, before)


def test_a_setting_that_a_note_does_not_name_had_its_default() -> None:
    assert changes({}, load_config(), LEARN) == {}
    assert set(changes({}, load_config(None, ["learn.steps=3"]), LEARN)) == {"learn.steps"}


def test_what_was_done_before_there_was_a_setting_is_told_by_the_artefacts(tmp_path: Path) -> None:
    """Before ``data.bos`` no document began with a BOS, which is not what its default means."""
    now = load_config(None, ["data.bos=false", "data.eod=null"])
    for sections in (TOKENIZE, LEARN):
        before = deciding_settings(load_config(), sections)
        assert set(changes(before, now, sections)) == {"data.bos", "data.eod"}
        del before["data.bos"]
        assert set(changes(before, now, sections)) == {"data.eod"}
    learned(tmp_path)
    file = tmp_path / "quickstart.json"
    recorded = json.loads(file.read_text())
    with pytest.raises(ConfigError, match=r"data\.bos = False: learn in .* was made with 'auto'"):
        check(tmp_path, "data.bos=false")
    del recorded["learn"]["data.bos"]
    file.write_text(json.dumps(recorded))
    check(tmp_path, "data.bos=false")


def test_settings_without_effect_can_be_ignored() -> None:
    now = load_config(None, ["learn.maskpro.lr=3"])
    assert set(changes({}, now, LEARN)) == {"learn.maskpro.lr"}
    assert changes({}, now, LEARN, ignored={"learn.maskpro.lr"}) == {}


def test_each_artefact_has_its_own_settings() -> None:
    config = load_config(None, ["data.domains.code.kind=stdlib"])
    assert set(deciding_settings(config, GGUF)) == {"model.gguf"}
    assert set(deciding_settings(config, CONVERT)) == {"model.hf", "model.megatron"}
    assert {"data.eod", "data.domains.code.kind"} <= set(deciding_settings(config, TOKENIZE))
    assert "calibration.micro_batch" not in deciding_settings(config, PRUNE)
    assert "evaluate.micro_batch" not in deciding_settings(config, EVALUATE)
    assert not any(key.startswith("data.domains") for key in deciding_settings(config, LEARN))


def test_paths_below_the_run_folder_are_relative_to_it() -> None:
    before = load_config(None, ["run_dir=/a/run", "model.hf=/a/run/hf"])
    after = load_config(None, ["run_dir=/b/run", "model.hf=/b/run/hf"])
    found = deciding_settings(before, LEARN)
    assert found["model.hf"] == "{run_dir}/hf" and changes(found, after, LEARN) == {}
    # a note from before paths were relative, read where it was written
    assert changes({"model.hf": "/a/run/hf"}, before, LEARN) == {}


SPELLINGS: list[Callable[[str], str]] = [
    lambda path: f"{path}/",
    lambda path: path.replace("/", "//"),
    lambda path: f"{path}/../{Path(path).name}",
    lambda path: f"./{os.path.relpath(path)}",
    lambda path: str(Path(path).parent / "link" / Path(path).name),
    lambda path: path.replace(str(Path.home()), "~", 1),
]


@pytest.mark.parametrize("key", ["model.hf", "data.tokenizer", "learn.prior.mask"])
def test_spellings_of_a_path_are_one_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """Any spelling before and any now, inside the run folder and outside it, never differ; another
    path differs under any spelling.
    """
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    for place in ("run/hf", "outside/hf", "other/hf"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place).with_name("link").symlink_to((tmp_path / place).parent)
    words = [f"run_dir={tmp_path / 'run'}"]
    for place in ("run/hf", "outside/hf"):
        path = str(tmp_path / place)
        spelled = [path, *(spell(path) for spell in SPELLINGS)]
        assert len(set(spelled)) == 7
        for before in spelled:
            found = deciding_settings(load_config(None, [*words, f"{key}={before}"]), LEARN)
            for now in spelled:
                assert not changes(found, load_config(None, [*words, f"{key}={now}"]), LEARN)
            for spell in SPELLINGS:
                now = spell(str(tmp_path / "other" / "hf"))
                assert set(changes(found, load_config(None, [*words, f"{key}={now}"]), LEARN)) == {
                    key
                }


def learned(folder: Path, *words: str) -> None:
    config = load_config(None, [f"run_dir={folder}", *words])
    pipeline.record("learn", 1.0, 0, config, run_paths(config))
    mask = run_paths(config).mask("learned")
    mask.parent.mkdir(parents=True)
    mask.touch()


def check(folder: Path, *words: str) -> None:
    config = load_config(None, [f"run_dir={folder}", *words])
    pipeline.check(config, run_paths(config))


def test_a_stage_goes_on_with_whatever_learning_resumes_with(tmp_path: Path) -> None:
    learned(tmp_path)
    check(tmp_path, *[word for word in FREE_OF_LEARNING if "run_dir" not in word], *WITHOUT_EFFECT)
    with pytest.raises(ConfigError, match=r"seed = 7: learn in .* was made with 1234"):
        check(tmp_path, "seed=7")
    config = load_config(None, [f"run_dir={tmp_path}", "learn.steps=3000"])
    pipeline.check(config, run_paths(config))  # the verb learn goes on, so it is not done
    assert not pipeline.is_done("learn", config, run_paths(config))
    for words, done in (
        (["learn.steps=3"], True),
        (["learn.steps=3", "learn.optimizer.clip=3"], False),
    ):
        config = load_config(None, [f"run_dir={tmp_path}", *words])
        assert pipeline.is_done("learn", config, run_paths(config)) is done
    config = load_config(None, [f"run_dir={tmp_path}"])
    assert pipeline.is_done("learn", config, run_paths(config))


def test_a_stage_that_was_recorded_in_old_words_is_understood(tmp_path: Path) -> None:
    learned(tmp_path)
    (tmp_path / "quickstart.json").write_text(
        '{"learn": {"learn.learner": "gumbel", "learn.distribution": "linear", '
        '"learn.micro_batch": 4, "learn.sampling.backend": "auto", "learn.optimizer.eps": 1e-8, '
        '"learn.optimizer.eps_rms": 0.1, "learn.loss.kind": "lm", "learn.loss.share": 0.5}}'
    )
    former = "learn.prior.margins=false"  # what was done before there was the setting
    check(tmp_path, "learn.micro_batch=2", former)
    with pytest.raises(ConfigError, match=r"learn\.prior\.margins = True: .* with False"):
        check(tmp_path)
    with pytest.raises(ConfigError, match=r"learn\.method = 'categorical': .* with 'subset'"):
        check(tmp_path, "learn.method=categorical", former)


def test_a_note_survives_being_written() -> None:
    found = deciding_settings(load_config(None, ["learn.preset=maskllm"]), LEARN)
    assert upgrade_note(found) == found
