"""A tiny model with its tokenizer, a small corpus of two domains, and a run folder that holds every
artefact before learning.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.e2e.program import here
from tests.fork_server import ROOT

VERBS = ("convert", "tokenize", "prune")
SENTENCE = (
    "the mask keeps two of every four weights in a row and learns which ones matter for the text "
    "that it reads"
)
WORDS = SENTENCE.split()


def prose(number: int) -> str:
    choose = random.Random(number)
    return ". ".join(
        " ".join(choose.choices(WORDS, k=choose.randint(5, 12)))
        for _ in range(choose.randint(8, 16))
    )


def code(number: int) -> str:
    choose = random.Random(1000 + number)
    lines = [
        f"    {choose.choice(WORDS)}_{choose.randint(0, 9)} = "
        f"{choose.choice(WORDS)}({choose.randint(0, 99)})"
        for _ in range(20)
    ]
    return "\n".join([f"def {choose.choice(WORDS)}_{number}():", *lines, "    return None"])


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of configs/models/tiny-llama.json with a tokenizer of its own, as a Hugging
    Face folder.
    """
    return make_model(tmp_path_factory.mktemp("models") / "tiny", seed=0)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture and tokenizer with other weights."""
    return make_model(tmp_path_factory.mktemp("models") / "other", seed=1)


def make_model(folder: Path, seed: int) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(
        LlamaConfig.from_pretrained(ROOT / "configs/models/tiny-llama.json")
    ).save_pretrained(folder)
    save_tokenizer(folder, vocab_size=512)
    return folder


def save_tokenizer(folder: Path, vocab_size: int, reserved: int = 0) -> None:
    """Train a byte-level BPE tokenizer on the corpus and put it beside the weights; ``reserved``
    ids come before those of text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = (
        ["<pad>", "<s>", "</s>", *(f"<{number}>" for number in range(reserved))],
        pre_tokenizers.ByteLevel.alphabet(),
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [make(number) for make in (prose, code) for number in range(40)], trainer
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``prose/`` with text files and ``code.jsonl``."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def make_corpus(folder: Path) -> Path:
    (folder / "prose").mkdir(parents=True)
    for number in range(40):
        (folder / "prose" / f"{number:02d}.txt").write_text(prose(number))
    (folder / "code.jsonl").write_text(
        "".join(json.dumps({"text": code(number)}) + "\n" for number in range(40))
    )
    return folder


@pytest.fixture(scope="session")
def settings(model: Path, corpus: Path) -> Callable[[Path], list[str]]:
    """``settings(run_dir)``: the overrides that make the debug recipe a run on the tiny model and
    both domains.
    """
    return lambda run_dir: run_settings(run_dir, model, corpus)


def run_settings(run_dir: Path, model: Path, corpus: Path) -> list[str]:
    return [
        f"run_dir={run_dir}",
        f"model.hf={model}",
        f"data.domains.prose={{kind: text, path: {corpus / 'prose'}, heldout: 0.2}}",
        f"data.domains.code={{kind: jsonl, path: {corpus / 'code.jsonl'}, heldout: 0.2}}",
        "data.blend={prose: 0.7, code: 0.3}",
        # A core for each worker, and a quarter of the recipe's passes of an evaluation.
        "parallel.threads=1",
        "evaluate.micro_batch=8",
    ]


@pytest.fixture(scope="session")
def prepared(
    settings: Callable[[Path], list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run folder after convert, tokenize and prune. Tests copy it (``prepared_copy``) before they
    change anything.
    """
    run_dir = tmp_path_factory.mktemp("prepared") / "run"
    for verb in VERBS:
        here(verb, *settings(run_dir))
    return run_dir


@pytest.fixture(scope="session")
def general(
    prepared: Path, settings: Callable[[Path], list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of the debug recipe that has learned on both domains, with snapshots of steps 2 and 4.
    Read it, do not write into it.
    """
    run_dir = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("general") / "run"))
    here("learn", *settings(run_dir))
    return run_dir


@pytest.fixture
def run_dir(prepared: Path, tmp_path: Path) -> Path:
    """A copy of ``prepared`` for one test."""
    return Path(shutil.copytree(prepared, tmp_path / "run"))
