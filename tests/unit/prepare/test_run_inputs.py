"""A learning run reads each of its inputs once, counted through the whole verb in this process."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megamask.config import Config, load_config, run_paths
from megamask.errors import ArtifactError, ConfigError
from megamask.masks import find
from megamask.masks.file import load_masks
from megamask.prepare.run_inputs import LearnInputs, RunInputs
from megamask.sparsity.pattern import Pattern
from megamask.verbs import convert, learn, prune, tokenize
from tests.e2e.conftest import make_corpus, make_model, run_settings

REPO = Path(__file__).resolve().parents[3]
OPENED: list[list[str]] = []  # the list that takes the paths while a test counts


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and OPENED:
        OPENED[-1].append(str(args[0]))


sys.addaudithook(_watch)  # sees every reader, and cannot be removed


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run folder with weights, shards and a magnitude mask; settings of two steps."""
    folder = tmp_path_factory.mktemp("inputs")
    model, corpus = make_model(folder / "hf", seed=0), make_corpus(folder / "corpus")
    overrides = [
        *run_settings(folder / "run", model, corpus),
        "device=cpu",
        "prune.methods=[magnitude]",
        "learn.prior.mask=magnitude",
        "learn.steps=2",
    ]
    config = load_config(REPO / "configs" / "recipes" / "debug.yaml", overrides)
    for verb in (convert, tokenize, prune):
        verb.run(config)
    return config


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Paths of the files that Python opens from now on."""
    OPENED.append([])
    yield OPENED[-1]
    OPENED.pop()


def test_a_learning_run_reads_each_input_once(
    prepared: Config, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: Counter[str] = Counter()
    priors: list[str] = []
    parse: Callable[..., Pattern] = Pattern.parse.__func__  # type: ignore[attr-defined]
    load = load_masks

    def counted(cls: type[Pattern], text: str) -> Pattern:
        parsed[sys._getframe(1).f_globals["__name__"]] += 1
        return parse(cls, text)

    def loaded(path: Path | str) -> Any:
        priors.append(Path(path).name)
        return load(path)

    monkeypatch.setattr(Pattern, "parse", classmethod(counted))
    monkeypatch.setattr(find, "load_masks", loaded)
    assert learn.run(prepared) == 0
    weights = run_paths(prepared).weights
    assert opened.count(str(weights / "config.json")) == 1
    assert opened.count(str(weights / "megamask.json")) == 1
    assert priors == ["magnitude.safetensors"]
    parsed.pop("megamask.masks.header")  # a mask file states its own pattern
    # The checks before any file is read, the inputs, the model, and the plan of a snapshot's
    # seconds, which stands on settings alone.
    assert parsed == {"megamask.weights.layer_plan": 4}


def test_nothing_is_read_before_it_is_asked_for(prepared: Config, opened: list[str]) -> None:
    inputs = LearnInputs(prepared)
    assert inputs.patterns == [Pattern(2, 4)] and inputs.layout.dp == 1
    assert opened == []
    assert inputs.prior is not None and inputs.prior_method == "magnitude"
    assert inputs.prior is inputs.prior and inputs.modules is inputs.modules
    assert set(inputs.prior) == set(inputs.modules)


def test_what_is_missing_names_its_verb(prepared: Config, tmp_path: Path) -> None:
    elsewhere = prepared.model_copy(update={"run_dir": str(tmp_path / "none")})
    with pytest.raises(ArtifactError, match="Run the verb convert"):
        _ = RunInputs(elsewhere).fingerprint


def test_tokens_that_the_model_does_not_know(prepared: Config, tmp_path: Path) -> None:
    """The architecture that the inputs hold decides, so a smaller vocabulary is refused."""
    inputs = RunInputs(prepared)
    inputs.check_text()
    config = run_paths(prepared).weights / "config.json"
    before = config.read_text()
    config.write_text(json.dumps({**json.loads(before), "vocab_size": 8}))
    try:
        inputs.check_text()  # it was read already
        with pytest.raises(ArtifactError, match="the model knows 8 ids"):
            RunInputs(prepared).check_text()
    finally:
        config.write_text(before)


def test_a_pattern_that_is_none(prepared: Config) -> None:
    with pytest.raises(ConfigError, match="pattern = '4:2'"):
        _ = RunInputs(prepared.model_copy(update={"pattern": "4:2"})).patterns
