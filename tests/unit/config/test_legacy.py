"""Old words of recipes, overrides and snapshot notes mean what they meant."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from megamask.config import Config, load_config
from megamask.config.deciding import changes, deciding_settings
from megamask.config.legacy import upgrade_note
from megamask.config.load import build_config
from megamask.errors import ConfigError

CASES: list[tuple[list[str], list[str]]] = [
    (["learn.learner=maskpro"], ["learn.method=maskpro"]),
    (["learn.learner=maskpro", "learn.distribution=linear"], ["learn.method=maskpro"]),
    (["learn.learner=gumbel"], []),
    (["learn.learner=gumbel", "learn.preset=maskllm"], ["learn.preset=maskllm"]),
    (
        ["learn.learner=gumbel", "learn.preset=maskpro"],
        ["learn.method=subset", "learn.preset=maskpro"],
    ),
    (["learn.distribution=linear"], ["learn.method=subset"]),
    (["learn.distribution=categorical"], ["learn.method=categorical"]),
    (["learn.distribution=linear", "learn.preset=maskpro"], ["learn.preset=maskpro"]),
    (["learn.footprint=leanest"], ["learn.memory=leanest"]),
    (["learn.state.movement=false"], ["learn.state.track_flips=false"]),
    (["learn.loss.kind=lm"], ["learn.distillation.share=0"]),
    (["learn.loss.kind=lm", "learn.loss.share=0.3"], ["learn.distillation.share=0"]),
    (["learn.loss.kind=kd", "learn.loss.share=0.3"], ["learn.distillation.share=1"]),
    (["learn.loss.kind=mix"], ["learn.distillation.share=0.5"]),
    (["learn.loss.kind=mix", "learn.loss.share=0.3"], ["learn.distillation.share=0.3"]),
    (["learn.loss.share=0.3"], []),  # of mix alone
    (
        ["learn.loss.temperature=2", "learn.loss.top_k=5"],
        ["learn.distillation.temperature=2", "learn.distillation.top_k=5"],
    ),
    (["learn.weight_norm.coef=1e-4"], ["learn.weight_norm=[1e-4, 0]"]),
    (["learn.weight_norm.decay=none"], ["learn.weight_norm=[1e-5, 1e-5]"]),
    (
        ["learn.weight_norm.coef=1e-4", "learn.preset=maskllm"],
        ["learn.weight_norm=[1e-4, 1e-4]", "learn.preset=maskllm"],
    ),
    (
        ["learn.weight_norm={coef: 1e-4, decay: linear}", "learn.preset=maskllm"],
        ["learn.weight_norm=[1e-4, 0]", "learn.preset=maskllm"],
    ),
    (["learn.optimizer.eps=1e-7"], ["learn.optimizer.epsilon=[1e-7, 0.1]"]),
    (
        ["learn.optimizer.eps=1e-7", "learn.preset=maskllm"],
        ["learn.optimizer.epsilon=[1e-7, 0]", "learn.preset=maskllm"],
    ),
    (["learn.optimizer.eps_rms=0.3"], ["learn.optimizer.epsilon=[1e-8, 0.3]"]),
    (["learn.monitor.tensorboard=false"], ["learn.monitor.sinks=[wandb_offline]"]),
    (["learn.monitor.wandb=off"], ["learn.monitor.sinks=[tensorboard]"]),
    (["learn.monitor.wandb=online"], ["learn.monitor.sinks=[tensorboard, wandb]"]),
    (["learn.monitor={tensorboard: false, wandb: off}"], ["learn.monitor.sinks=[]"]),
    (["learn.monitor.patience=3"], []),
    (["data.append_eod=false", "data.eod_token='<end>'"], ["data.eod=null"]),
    (["data.append_eod=true"], []),
    (["data.eod_token='<end>'"], ["data.eod='<end>'"]),
    (["data.eod_token=null"], []),
    (["learn.maskpro.baseline=winner"], ["learn.maskpro.baseline=hard_mask"]),
]


@pytest.mark.parametrize(("old", "new"), CASES, ids=lambda words: ",".join(words))
def test_old_words_mean_what_they_meant(
    old: list[str], new: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert load_config(None, old) == load_config(None, new)
    count = len(old) if not any("{" in word or "preset" in word for word in old) else None
    assert count is None or len(caplog.records) == count


def test_new_words_are_not_remarked_upon(caplog: pytest.LogCaptureFixture) -> None:
    load_config(None, ["learn.preset=maskllm", "learn.memory=lean", "learn.weight_norm=[1, 0]"])
    assert not caplog.records


def test_an_override_in_old_words_completes_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learn: {loss: {kind: mix}, weight_norm: {decay: none}, memory: lean}")
    learn = load_config(recipe, ["learn.loss.share=0.2", "learn.weight_norm.coef=1"]).learn
    assert (learn.distillation.share, learn.weight_norm) == (0.2, (1, 1))
    assert load_config(recipe, ["learn.footprint=default"]).learn.memory == "default"
    assert load_config(recipe, ["learn.memory=leanest"]).learn.optimizer.kind == "lion8bit"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["learn.learner=maskpro", "learn.distribution=categorical"], "learn.distribution = 'cat"),
        (["learn.preset=maskpro", "learn.distribution=categorical"], "Set learn.method alone"),
        (["learn.learner=maskpr"], "learn.learner = 'maskpr': one of gumbel, maskpro"),
        (["learn.loss.kind=text"], "It is learn.distillation.share now"),
        (["learn.footprint=tiny"], "learn.memory = 'tiny'"),
        (["learn.monitor.tensorboard=1"], "one of true, false"),
        (["learn.loss.kinds=kd"], "learn.loss = {'kinds': 'kd'}: no such setting"),
    ],
)
def test_wrong_old_words_are_one_clear_error(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, words)
    assert said in str(refused.value)


def test_old_words_from_python() -> None:
    given: dict[str, Any] = {"learn": {"footprint": "lean", "distribution": "categorical"}}
    learn = build_config(given).learn
    assert (learn.memory, learn.method, learn.state.logits) == ("lean", "categorical", "bf16")
    assert given == {"learn": {"footprint": "lean", "distribution": "categorical"}}  # as it was


NOTE: dict[str, Any] = {
    "seed": 1234,
    "data": {"blend": {"prose": 0.7}, "append_eod": False, "eod_token": None},
    "learn": {
        "learner": "gumbel",
        "distribution": "linear",
        "optimizer": {"eps": 1e-8, "eps_rms": 0.1},
        "loss": {"kind": "kd", "share": 0.5, "temperature": 1.0, "top_k": None},
        "weight_norm": {"coef": 1e-5, "decay": "none"},
        "maskpro": {"baseline": "winner"},
    },
}


def test_an_old_note_is_understood() -> None:
    expected = {
        "seed": 1234,
        "data.blend.prose": 0.7,
        "data.eod": None,
        "learn.method": "subset",
        "learn.prior.margins": False,  # as before there was the setting
        "learn.sampling.noise": 1.0,  # likewise
        "learn.optimizer.epsilon": [1e-8, 0.1],
        "learn.distillation.share": 1.0,
        "learn.distillation.temperature": 1.0,
        "learn.distillation.top_k": None,
        "learn.weight_norm": [1e-5, 1e-5],
        "learn.maskpro.baseline": "hard_mask",
    }
    assert upgrade_note(NOTE) == expected
    assert upgrade_note(expected) == expected  # a note of today, flattened


@pytest.mark.parametrize("method", ["subset", "categorical"])
def test_a_note_from_before_noise_drew_with_noise(method: str) -> None:
    config = load_config(None, [f"learn.method={method}", "learn.sampling.noise=1"])
    note = deciding_settings(config, ["learn"])
    del note["learn.sampling.noise"]
    old = upgrade_note(note)
    assert changes(old, config, ["learn"]) == {}
    today = config.model_copy(
        update={
            "learn": config.learn.model_copy(
                update={"sampling": config.learn.sampling.model_copy(update={"noise": 0.0})}
            )
        }
    )
    assert changes(old, today, ["learn"]) == {"learn.sampling.noise": (1.0, 0.0)}


def test_a_note_with_clip_0_learned_without_the_relative_epsilon() -> None:
    optimizer = {"epsilon": [1e-8, 0.1], "clip": 0.0}
    note = {"learn": {"method": "subset", "optimizer": optimizer}}
    assert upgrade_note(note)["learn.optimizer.epsilon"] == [1e-8, 0.0]
    optimizer["clip"] = 1.0
    assert upgrade_note(note)["learn.optimizer.epsilon"] == [1e-8, 0.1]


def test_a_note_from_before_distribution_and_epsilon_was_categorical_without_it() -> None:
    learn = {key: value for key, value in NOTE["learn"].items() if key != "distribution"}
    found = upgrade_note({"learn": {**learn, "optimizer": {"eps": 1e-8}}})
    assert found["learn.method"] == "categorical"
    assert found["learn.optimizer.epsilon"] == [1e-8, 0.0]


def test_named_settings_apply_from_python_as_from_a_recipe() -> None:
    for name in ("maskllm", "maskpro"):
        wanted = load_config(None, [f"learn.preset={name}", "learn.memory=lean"])
        given = {"learn": {"preset": name, "memory": "lean"}}
        assert build_config(given) == wanted
        assert Config.model_validate(given) == wanted
        assert Config(**given) == wanted
        section = Config().learn.model_copy(update={"preset": name, "memory": "lean"})
        assert section.model_fields_set == {"preset", "memory"}
        assert Config(learn=section) == wanted
    kept = Config(learn={"preset": "maskllm", "steps": 3}).learn
    assert (kept.steps, kept.optimizer.lr) == (3, 5e-4)
