"""Held-out windows and calibration samples."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from megamask.config import Config, run_paths
from megamask.data.blend import train_dataset
from megamask.data.heldout import (
    calibration_description,
    calibration_tokens,
    evaluated_domains,
    evaluation_windows,
    heldout_windows,
)
from megamask.data.shards import read_shards
from megamask.errors import ArtifactError, ConfigError
from megamask.verbs import evaluate, learn, tokenize


def test_windows_cut_the_held_out_stream_and_drop_the_tail(
    two_domains: Callable[..., Config],
) -> None:
    config = two_domains()
    tokenize.run(config)
    stream = np.array(read_shards(run_paths(config).shards / "a").stream("heldout"), dtype=np.int64)
    windows = heldout_windows(config, "a", 20, None)
    assert windows.dtype == torch.int64 and windows.shape == (len(stream) // 20, 20)
    np.testing.assert_array_equal(windows.flatten(), stream[: windows.numel()])
    limited = heldout_windows(config, "a", 20, 95)
    assert torch.equal(limited, windows[:4])


def test_one_bos_before_the_stream(two_domains: Callable[..., Config]) -> None:
    config = two_domains()
    tokenize.run(config)
    plain = heldout_windows(config, "a", 20, 60).flatten()
    with_bos = heldout_windows(two_domains(evaluate={"bos": True}), "a", 20, 60).flatten()
    assert with_bos.tolist() == [1, *plain[:-1].tolist()]


def test_windows_that_cannot_be(two_domains: Callable[..., Config]) -> None:
    config = two_domains()
    tokenize.run(config)
    with pytest.raises(ArtifactError, match=r"too few for one window of 1000000.*evaluate\.window"):
        heldout_windows(config, "a", 1_000_000, None)
    with pytest.raises(ConfigError, match=r"evaluate\.max_tokens"):
        heldout_windows(config, "a", 20, 19)
    with pytest.raises(ConfigError, match=r"data\.domains"):
        heldout_windows(config, "c", 20, None)


def test_each_domain_serves_learning_or_evaluation_or_both(
    two_domains: Callable[..., Config], tokenizer_folder: Path
) -> None:
    """Domain a only serves learning, domain b only evaluation.

    Every document of b is in the evaluation, and none in the samples.
    """
    settings = two_domains(blend={"a": 1}, evaluate={"window": 20}).model_dump()
    settings["data"]["domains"]["a"]["heldout"] = 0
    settings["data"]["domains"]["b"]["heldout"] = 1
    config = Config.model_validate(settings)
    tokenize.run(config)
    assert evaluated_domains(config) == ["b"]
    windows = evaluation_windows(config, None)
    assert list(windows) == ["b"] and torch.equal(
        windows["b"], heldout_windows(config, "b", 20, None)
    )
    plain = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))

    def documents(rows: Iterable[torch.Tensor]) -> set[int]:
        texts = [plain.decode(row.tolist()) for row in rows]
        return {int(number) for text in texts for number in re.findall(r"doc(\d+)x", text)}

    dataset = train_dataset(config, 600, 48, seed=3)
    learned = documents(dataset[number]["tokens"] for number in range(600))
    evaluated = documents([windows["b"].flatten()])
    assert learned == set(range(60)) and evaluated >= set(range(100, 159))


def test_without_held_out_text_nothing_can_be_evaluated(
    two_domains: Callable[..., Config],
) -> None:
    settings = two_domains().model_dump()
    for corpus in settings["data"]["domains"].values():
        corpus["heldout"] = 0
    config = Config.model_validate(settings)
    said = r"data\.domains = .*at least one domain with a heldout above 0.*heldout=0\.05"
    with pytest.raises(ConfigError, match=said):
        evaluated_domains(config)
    for verb in (evaluate.run, learn.run):
        with pytest.raises(ConfigError, match=said):
            verb(config)


def test_a_tokenizer_without_bos(
    two_domains: Callable[..., Config], tokenizer_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path / "no_bos")
    config = two_domains(tokenizer=str(tmp_path / "no_bos"), evaluate={"bos": True})
    tokenize.run(config)
    with pytest.raises(ConfigError, match=r"evaluate\.bos"):
        heldout_windows(config, "a", 20, None)


def test_calibration_is_seeded_and_recorded(two_domains: Callable[..., Config]) -> None:
    settings = {"samples": 6, "seq_length": 24, "seed": 5}
    config = two_domains(calibration=settings, blend={"a": 3, "b": 1})
    tokenize.run(config)
    found = calibration_tokens(config)
    assert found.shape == (6, 24) and found.dtype == torch.int64
    assert torch.equal(found, calibration_tokens(config))
    dataset = train_dataset(config, 6, 24, 5)
    assert torch.equal(found, torch.stack([dataset[index]["tokens"] for index in range(6)]))
    assert not torch.equal(
        found,
        calibration_tokens(
            two_domains(calibration={**settings, "seed": 6}, blend={"a": 3, "b": 1})
        ),
    )
    described = calibration_description(config)
    assert {key: described[key] for key in settings} == settings and described["blend"] == {
        "a": 0.75,
        "b": 0.25,
    }
    assert described["shards_sha256"]["a"] == read_shards(run_paths(config).shards / "a").digests(
        "train"
    )
