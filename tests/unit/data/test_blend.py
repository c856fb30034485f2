"""Blended training samples: ratio, content, determinism, and no held-out text in them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from megamask.config import Config, run_paths
from megamask.data.blend import blend_weights, train_dataset
from megamask.data.heldout import calibration_description, evaluation_windows
from megamask.data.shards import read_shards
from megamask.errors import ArtifactError, ConfigError
from megamask.verbs import tokenize

SEQ = 32


def tokens(dataset: Any, count: int) -> torch.Tensor:
    return torch.stack([dataset[index]["tokens"] for index in range(count)])


def document_numbers(dataset: Any, count: int, tokenizer_folder: Path) -> set[int]:
    plain = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    texts = plain.decode_batch(tokens(dataset, count).tolist())
    return {int(number) for text in texts for number in re.findall(r"doc(\d+)x", text)}


def test_samples_are_stretches_of_training_text_with_shifted_labels(
    two_domains: Callable[..., Config],
) -> None:
    config = two_domains(blend={"a": 1, "b": 0})
    tokenize.run(config)
    dataset = train_dataset(config, 50, SEQ, seed=3)
    stream = read_shards(run_paths(config).shards / "a").stream("train").tolist()
    documents = {
        tuple(map(int, part.split()))
        for part in " ".join(map(str, stream)).replace(" 0 ", " 0|").split("|")
    }
    inside = {text[start : start + 8] for text in documents for start in range(len(text) - 7)}
    for index in range(50):
        sample = dataset[index]
        assert (
            sample["tokens"].shape == sample["labels"].shape == (SEQ,)
            and sample["tokens"].dtype == torch.int64
        )
        assert (
            torch.equal(sample["tokens"][1:], sample["labels"][:-1])
            and "attention_mask" not in sample
        )
        row = sample["tokens"].tolist()
        pieces = [
            row[start : start + 8] for start in range(SEQ - 7) if 0 not in row[start : start + 7]
        ]
        assert all(tuple(piece) in inside for piece in pieces)
        assert tuple(reversed(pieces[0])) not in inside  # the check can fail


def test_blend_ratio_and_many_epochs(
    two_domains: Callable[..., Config], tokenizer_folder: Path
) -> None:
    config = two_domains(blend={"a": 7, "b": 3})
    tokenize.run(config)
    count = 2000  # far more than one pass over either domain
    dataset = train_dataset(config, count, SEQ, seed=3)
    assert len(dataset) >= count
    from_a = sum(int(dataset[index]["dataset_id"]) == 0 for index in range(count))
    assert abs(from_a - 1400) <= 1  # Megatron's interleaving stays within one sample of the ratio
    assert all(dataset[index]["dataset_id"] in (0, 1) for index in range(20))


def test_held_out_documents_are_never_trained_on(
    two_domains: Callable[..., Config], tokenizer_folder: Path
) -> None:
    config = two_domains()
    tokenize.run(config)
    plain = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    held: set[int] = set()
    for name in ("a", "b"):
        text = plain.decode(read_shards(run_paths(config).shards / name).stream("heldout").tolist())
        held |= {int(number) for number in re.findall(r"doc(\d+)x", text)}
    seen = document_numbers(train_dataset(config, 1500, SEQ, seed=3), 1500, tokenizer_folder)
    assert held and held.isdisjoint(seen) and held | seen == {*range(60), *range(100, 160)}
    settings = config.model_dump()
    settings["run_dir"] += "-leaky"
    for corpus in settings["data"]["domains"].values():
        corpus["heldout"] = 0.0
    leaky = Config.model_validate(settings)
    tokenize.run(leaky)
    assert held <= document_numbers(
        train_dataset(leaky, 1500, SEQ, seed=3), 1500, tokenizer_folder
    )  # the check can fail


def test_order_is_fixed_by_config_and_seed_and_survives_a_lost_or_stale_cache(
    two_domains: Callable[..., Config], tmp_path: Path
) -> None:
    config = two_domains()
    tokenize.run(config)
    first = tokens(train_dataset(config, 100, SEQ, seed=3), 100)
    assert torch.equal(first, tokens(train_dataset(config, 100, SEQ, seed=3), 100))
    assert not torch.equal(first, tokens(train_dataset(config, 100, SEQ, seed=4), 100))
    shutil.rmtree(run_paths(config).shards / "cache")
    assert torch.equal(first, tokens(train_dataset(config, 100, SEQ, seed=3), 100))
    other = two_domains(eod="<end>")  # same paths and sizes, other content
    tokenize.run(other)
    changed = tokens(train_dataset(other, 100, SEQ, seed=3), 100)
    assert torch.equal(changed, torch.where(first == 0, 2, first))


@pytest.mark.parametrize(
    ("blend", "message"),
    [
        ({"a": 1, "b": -0.5}, r"data\.blend\.b = -0\.5"),
        ({"a": 0, "b": 0}, r"data\.blend .*above 0"),
        ({"a": 1, "b": float("nan")}, r"data\.blend\.b"),
        ({"a": 1, "b": float("inf")}, r"data\.blend\.b"),
        ({"a": 1, "b": 1, "c": 1}, r"data\.blend\.c.*a, b"),
    ],
)
def test_blend_weights_that_cannot_work(
    two_domains: Callable[..., Config], blend: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):  # an infinite one when the settings are read
        blend_weights(two_domains(blend=blend))
    if sum(blend.values()) != 0:  # weights of 0 alone leave domains to evaluate on
        with pytest.raises(ConfigError, match=message):
            tokenize.run(two_domains(blend=blend))


def test_blend_weights(
    two_domains: Callable[..., Config], make_config: Callable[..., Config]
) -> None:
    assert blend_weights(two_domains()) == {"a": 0.5, "b": 0.5}
    assert blend_weights(two_domains(blend={"b": 3, "a": 1})) == {"a": 0.25, "b": 0.75}
    assert blend_weights(two_domains(blend={"b": 0, "a": 5})) == {"a": 1.0}
    assert blend_weights(two_domains(blend={"b": 2})) == {"b": 1.0}
    assert blend_weights(
        make_config({"a": {"kind": "stdlib"}, "test": {"kind": "text", "heldout": 1}})
    ) == {"a": 1.0}


def test_a_domain_that_is_all_held_out_cannot_be_learned_from(
    make_config: Callable[..., Config],
) -> None:
    domains = {"a": {"kind": "stdlib"}, "test": {"kind": "text", "heldout": 1}}
    said = r"data\.blend\.test = 2\.0: 0, for data\.domains\.test\.heldout=1.*Leave the domain out"
    with pytest.raises(ConfigError, match=said):
        blend_weights(make_config(domains, blend={"a": 1, "test": 2}))
    assert blend_weights(make_config(domains, blend={"a": 1, "test": 0})) == {"a": 1.0}


def test_a_run_that_only_evaluates_is_tokenized(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    (tmp_path / "test.txt").write_text("some text to measure on " * 50)
    config = make_config(
        {"test": {"kind": "text", "path": str(tmp_path / "test.txt"), "heldout": 1}}
    )
    tokenize.run(config)
    assert len(evaluation_windows(config, None)["test"]) > 0
    with pytest.raises(ConfigError, match=r"(?s)data\.domains = .*below 1.*add such a domain"):
        blend_weights(config)  # nothing to learn from


def test_one_document_is_called_so(make_config: Callable[..., Config], tmp_path: Path) -> None:
    """No share of it can be held out."""
    (tmp_path / "one.txt").write_text("some text " * 50)
    corpus = {"kind": "text", "path": str(tmp_path / "one.txt"), "heldout": 0.9}
    config = make_config({"one": corpus})
    tokenize.run(config)
    with pytest.raises(ArtifactError, match=r"has no heldout text.*one is one document"):
        evaluation_windows(config, None)


def test_the_order_of_domains_counts_where_it_decides(make_config: Callable[..., Config]) -> None:
    """Samples are dealt in the order of ``data.domains``."""
    one = {"kind": "stdlib", "max_bytes": 100_000}
    given = {}
    for names in (("a", "b"), ("b", "a")):
        config = make_config({name: one for name in names})
        tokenize.run(config)
        given[names] = calibration_description(config)
    assert "order" not in given["a", "b"]  # as in masks of before
    assert given["b", "a"] == {**given["a", "b"], "order": ["b", "a"]}


def test_shards_that_do_not_fit_are_refused(
    two_domains: Callable[..., Config], other_tokenizer_folder: Path
) -> None:
    config = two_domains()
    with pytest.raises(ArtifactError, match="verb tokenize"):
        train_dataset(config, 10, SEQ, seed=3)
    tokenize.run(config)
    with pytest.raises(ArtifactError, match="tokenizer"):
        train_dataset(two_domains(tokenizer=str(other_tokenizer_folder)), 10, SEQ, seed=3)
    file = run_paths(config).shards / "b" / "train.bin"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match="truncated"):
        train_dataset(config, 10, SEQ, seed=3)
