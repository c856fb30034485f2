"""Where the BOS stands in documents, calibration samples and windows, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megamask.config import Config, run_paths
from megamask.data.blend import train_dataset
from megamask.data.bos import cut_windows, description, is_described
from megamask.data.heldout import calibration_description, calibration_tokens, heldout_windows
from megamask.data.shards import read_shards
from megamask.data.tokenizer import load_tokenizer
from megamask.data.write_shards import settings_digest
from megamask.errors import ArtifactError, ConfigError
from megamask.verbs import tokenize

BOS, EOS = 1, 0
CALIBRATION = {"samples": 8, "seq_length": 16}


@pytest.fixture(scope="module")
def bos_tokenizer_folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer with the template of Llama's: a BOS before each prompt."""
    from tokenizers import Tokenizer, processors

    folder = tmp_path_factory.mktemp("bos") / "tokenizer"
    shutil.copytree(tokenizer_folder, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def documents_of(config: Config, domain: str, split: str) -> list[list[int]]:
    """The documents of a split, from the stream, which has an EOS after each."""
    shards = read_shards(run_paths(config).shards / domain)
    text = " ".join(map(str, shards.stream(split)))
    return [list(map(int, part.split())) for part in f" {text} ".split(f" {EOS} ")[:-1]]


def test_auto_follows_the_tokenizer(
    two_domains: Callable[..., Config], bos_tokenizer_folder: Path
) -> None:
    plain = two_domains()
    tokenize.run(plain)
    assert not load_tokenizer(plain).adds_bos
    before = {split: documents_of(plain, "a", split) for split in ("train", "heldout")}
    assert read_shards(run_paths(plain).shards / "a").meta["prepend_bos"] is False
    with_bos = two_domains(tokenizer=str(bos_tokenizer_folder))
    tokenizer = load_tokenizer(with_bos)
    assert tokenizer.adds_bos and tokenizer.fingerprint == load_tokenizer(plain).fingerprint
    tokenize.run(with_bos)
    for split, documents in before.items():
        assert documents_of(with_bos, "a", split) == [[BOS, *document] for document in documents]
    shards = read_shards(run_paths(with_bos).shards / "a")
    assert shards.meta["prepend_bos"] is True
    assert shards.tokens("train") == len(shards.stream("train"))


def test_a_tokenizer_without_bos_keeps_every_byte_and_digest(
    two_domains: Callable[..., Config], bos_tokenizer_folder: Path
) -> None:
    """``auto`` and ``false`` are one thing for it, so its shards are not made again."""
    auto, off = two_domains(), two_domains(bos=False)
    tokenizer = load_tokenizer(auto)
    digest = settings_digest(auto, "a", tokenizer)
    assert digest == settings_digest(off, "a", tokenizer)
    assert digest != settings_digest(two_domains(bos=True), "a", tokenizer)
    tokenize.run(auto)
    assert "bos" not in calibration_description(auto)
    assert description(auto, tokenizer) == "none"
    llama = two_domains(tokenizer=str(bos_tokenizer_folder), bos=False)
    assert settings_digest(llama, "a", load_tokenizer(llama)) == digest
    unbegun = two_domains(tokenizer=str(bos_tokenizer_folder), evaluate={"bos": False})
    assert description(unbegun, load_tokenizer(unbegun)) == "one before each document"


def test_windows_and_calibration_begin_with_it(
    two_domains: Callable[..., Config], bos_tokenizer_folder: Path
) -> None:
    config = two_domains(tokenizer=str(bos_tokenizer_folder), calibration=CALIBRATION)
    tokenize.run(config)
    windows = heldout_windows(config, "a", 20, None)
    assert (windows[:, 0] == BOS).all() and not (windows[:, 1] == BOS).any()
    # Without the BOS that was added, the windows are the stream.
    stream = read_shards(run_paths(config).shards / "a").stream("heldout")
    at = 0
    for row in windows.tolist():
        body = row if stream[at] == BOS else row[1:]
        assert body == stream[at : at + len(body)].tolist()
        at += len(body)
    assert len(stream) - at < 20
    samples = calibration_tokens(config)
    assert samples.shape == (8, 16) and (samples[:, 0] == BOS).all()
    dataset = train_dataset(config, 8, 16, config.calibration.seed)
    plain = torch.stack([dataset[number]["tokens"] for number in range(8)])
    begun = plain[:, 0] == BOS
    assert torch.equal(samples[begun], plain[begun])
    assert torch.equal(samples[~begun][:, 1:], plain[~begun][:, :-1]) and (~begun).any()
    assert calibration_description(config)["bos"] == BOS
    words = "one at the start of each window, and one before each document"
    assert description(config, load_tokenizer(config)) == words


def test_shards_with_the_other_setting_are_refused(
    two_domains: Callable[..., Config], bos_tokenizer_folder: Path
) -> None:
    plain = two_domains()
    llama = two_domains(tokenizer=str(bos_tokenizer_folder))
    tokenize.run(plain)
    said = r"do not begin with a BOS.*Run the verb tokenize, or set data\.bos=false"
    with pytest.raises(ArtifactError, match=said):
        heldout_windows(llama, "a", 20, None)
    with pytest.raises(ArtifactError, match=said):
        train_dataset(llama, 10, 16, seed=1)
    off = two_domains(tokenizer=str(bos_tokenizer_folder), bos=False)
    assert torch.equal(heldout_windows(off, "a", 20, None), heldout_windows(plain, "a", 20, None))
    tokenize.run(llama)
    with pytest.raises(ArtifactError, match=r"begin with a BOS.*set data\.bos=true"):
        heldout_windows(plain, "a", 20, None)


@pytest.mark.parametrize("place", [True, "window"])
def test_a_tokenizer_without_any_bos(
    two_domains: Callable[..., Config], tokenizer_folder: Path, tmp_path: Path, place: object
) -> None:
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "no_bos"))
    label = folder / "tokenizer_config.json"
    settings = json.loads(label.read_text())
    del settings["bos_token"]
    label.write_text(json.dumps(settings))
    for file in folder.glob("special_tokens_map.json"):
        file.unlink()
    tokenize.run(two_domains(tokenizer=str(folder)))
    with pytest.raises(ConfigError, match=r"evaluate\.bos.*has no BOS"):
        config = two_domains(tokenizer=str(folder), evaluate={"bos": place})
        heldout_windows(config, "a", 20, None)
    with pytest.raises(ConfigError, match=r"data\.bos.*has no BOS"):
        tokenize.run(two_domains(tokenizer=str(folder), bos=True))


@pytest.mark.parametrize("most", [None, 12, 13, 100])
@pytest.mark.parametrize("starts", [(), (0,), (0, 5, 6, 11), (4, 8)])
def test_windows_hold_the_stream(starts: tuple[int, ...], most: int | None) -> None:
    """All tokens of the stream are there in order, the BOS of a document is never doubled."""
    stream = np.arange(10, 40, dtype=np.int64)
    stream[list(starts)] = BOS
    windows = cut_windows(stream, 6, "window", BOS, most)
    assert windows.shape[1] == 6 and (windows[:, 0] == BOS).all()
    assert len(windows) == {12: 2, 13: 2}.get(most or 0, 5 if 0 in starts else 6)
    flat = [token for token in windows.flatten().tolist() if token != BOS]
    assert flat == [token for token in stream.tolist() if token != BOS][: len(flat)]
    assert (windows == BOS).sum() <= len(starts) + len(windows)
    assert not any(row[0] == row[1] == BOS for row in windows)
    once = cut_windows(stream, 6, "stream", BOS, most).flatten().tolist()
    whole = stream.tolist() if starts[:1] == (0,) else [BOS, *stream.tolist()]
    assert once == whole[: len(once)] and len(once) == min(30, most or 30) // 6 * 6
    plain = cut_windows(stream, 6, "none", None, most).flatten().tolist()
    assert plain == stream.tolist()[: len(plain)]


@pytest.mark.parametrize("before", [True, False])
def test_a_description_tells_which_setting_made_it(
    two_domains: Callable[..., Config], bos_tokenizer_folder: Path, before: bool
) -> None:
    """Of the same documents: reports hold the settings of learning and the words of a table."""
    config = two_domains(tokenizer=str(bos_tokenizer_folder))
    data = config.data.model_copy(update={"bos": before})
    chosen: list[Any] = ["auto", True, False, "window"]

    def described(choice: Any) -> str:
        evaluate = config.evaluate.model_copy(update={"bos": choice})
        asked = config.model_copy(update={"data": data, "evaluate": evaluate})
        return description(asked, load_tokenizer(asked))

    for made in chosen:
        for asked in chosen:
            assert is_described(asked, described(made)) == (described(asked) == described(made))
