"""WikiText-2 as published tables measure it, against the loops of programs in transformers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megamask.masks.file import load_masks, save_masks
from megamask.sparsity.pattern import Pattern
from megamask.weights.base_model import BaseModel
from tests.e2e.conftest import prose, save_tokenizer
from tests.e2e.program import here, in_process, refusal

WINDOW = 2048
# fp32 sums in another order, in a model with large weights: four digits are equal. Every wrong
# reading below is off by at least four times that: without the BOS, 6e-4.
SAME, OTHER = 5e-5, 2e-4


@dataclass(frozen=True)
class Run:
    """A converted model with one mask, and the text; no domain was tokenized."""

    hf: Path
    mask: Path
    words: list[str]
    folder: Path
    rows: list[str]

    @property
    def text(self) -> str:
        return "\n\n".join(self.rows)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("published")
    hf = make_model(folder / "hf")
    # Other tools leave linears dense, also one part of what is a single linear in Megatron.
    names = [f"model.layers.{n}.mlp.{name}_proj" for n in (0, 1) for name in ("up", "down")]
    names += ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.gate_proj"]
    weights, pattern = load_file(hf / "model.safetensors"), Pattern(2, 4)
    masks = {name: pattern.best(weights[f"{name}.weight"].abs()) for name in names}
    mask = folder / "mine.safetensors"
    save_masks(mask, masks, pattern, fingerprint=BaseModel(hf).fingerprints().exact, method="mine")
    rows = ["", " = Title = \n", "", *(f" {prose(number)} \n" for number in range(20))]
    file = folder / "test.jsonl"
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    words = [f"run_dir={folder / 'run'}", f"model.hf={hf}", f"evaluate.masks={{mine: {mask}}}"]
    words += ["evaluate.protocol=wikitext2-2048", f"evaluate.text={file}"]
    here("convert", *words)
    return Run(hf, mask, words, folder, rows)


def make_model(folder: Path) -> Path:
    """A Llama with large random weights, so that every token shows, and a tokenizer like Llama's,
    which puts a BOS before a text.
    """
    from tokenizers import Tokenizer, processors
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 300}
    model = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=WINDOW))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.save_pretrained(folder)
    save_tokenizer(folder, vocab_size=300)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@torch.no_grad()
def scripts_perplexity(model: Any, ids: list[int], starts: range, length: int = WINDOW) -> float:
    """The loop of GPTQ's, SparseGPT's and Wanda's scripts: loss of each window times its tokens,
    summed, over all tokens.
    """
    tokens, nlls, count = torch.tensor([ids]), [], 0
    for start in starts:
        window = tokens[:, start : start + length]
        logits = model(window).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], window[0, 1:])
        nlls.append(loss.float() * window.shape[1])
        count += window.shape[1]
    return math.exp(torch.stack(nlls).sum() / count)


def test_both_rows_are_those_of_the_published_scripts(run: Run) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said = here("evaluate", *run.words).stdout
    results = json.loads((run.folder / "run" / "results-wikitext2-2048.json").read_text())
    found = {row: values["wikitext2"] for row, values in results["perplexity"].items()}
    assert list(found) == ["dense", "mine"]
    assert not (run.folder / "run" / "results.json").exists()
    assert not (run.folder / "run" / "shards").exists()

    tokenizer = AutoTokenizer.from_pretrained(run.hf)
    ids: list[int] = tokenizer(run.text)["input_ids"]
    bos, count = ids[0], len(ids) // WINDOW
    assert bos == tokenizer.bos_token_id and count == 2 and len(ids) % WINDOW > 64
    model = AutoModelForCausalLM.from_pretrained(run.hf, dtype=torch.float32).eval()
    starts = range(0, count * WINDOW, WINDOW)
    expected = scripts_perplexity(model, ids, starts)
    assert found["dense"] == pytest.approx(expected, rel=SAME)
    begun = [i for s in range(1, 1 + count * (WINDOW - 1), WINDOW - 1)
             for i in [bos, *ids[s : s + WINDOW - 1]]]  # fmt: skip
    wrong = {
        "a BOS before each window": scripts_perplexity(model, begun, starts),
        "no BOS": scripts_perplexity(model, ids[1:], starts),
        "windows that overlap": scripts_perplexity(
            model, ids, range(0, count * WINDOW - WINDOW // 2, WINDOW // 2)
        ),
        "the tail kept": scripts_perplexity(model, ids, range(0, len(ids), WINDOW)),
        "rows joined by one line feed": scripts_perplexity(
            model, tokenizer("\n".join(run.rows))["input_ids"], starts
        ),
    }
    for reading, value in wrong.items():
        assert value != pytest.approx(expected, rel=OTHER), reading

    for name, mask_OI in load_masks(run.mask).items():
        model.get_submodule(name).weight.data *= mask_OI
    masked = scripts_perplexity(model, ids, starts)
    assert found["mine"] == pytest.approx(masked, rel=SAME)
    assert masked != pytest.approx(expected, rel=OTHER)

    protocol = results["protocol"]
    assert protocol["name"] == "wikitext2-2048" and protocol["dtype"] == "fp32"
    assert protocol["bos"] == "one at the start of the text" and protocol["tokenizer"] == "hf"
    assert protocol["windows"] == {"wikitext2": count}
    assert protocol["tokens"] == {"wikitext2": count * WINDOW}
    assert "name wikitext2-2048, window 2,048" in said and "wikitext2 4,096" in said
    assert said.index("| dense") < said.index("| mine")


@torch.no_grad()
def megatrons_perplexity(model: Any, ids: list[int], length: int = WINDOW) -> float:
    """The loop of Megatron-LM's tasks/zeroshot_gpt where windows do not overlap: ``length`` inputs
    and targets a window, the tail kept, the sum over the number of tokens - 1.
    """
    total = 0.0
    for start in range(0, len(ids) - 1, length):
        part = torch.tensor(ids[start : start + length + 1])
        logits = model(part[None, :-1]).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum"))
    return math.exp(total / (len(ids) - 1))


def test_every_target_counts_once_as_in_megatron_lm(run: Run) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    here("evaluate", *run.words, "evaluate.protocol=megatron-2048", "evaluate.masks={}")
    results = json.loads((run.folder / "run" / "results-megatron-2048.json").read_text())
    ids: list[int] = AutoTokenizer.from_pretrained(run.hf)(run.text)["input_ids"]
    assert len(ids) % WINDOW > 64
    model = AutoModelForCausalLM.from_pretrained(run.hf, dtype=torch.float32).eval()
    expected, found = megatrons_perplexity(model, ids), results["perplexity"]["dense"]["wikitext2"]
    assert found == pytest.approx(expected, rel=SAME)
    starts = range(0, len(ids) // WINDOW * WINDOW, WINDOW)
    for wrong in (
        scripts_perplexity(model, ids, starts),  # the protocol of the other tables
        megatrons_perplexity(model, ids[: 2 * WINDOW + 1]),  # without the tail
        megatrons_perplexity(model, ids[1:]),  # without the BOS
    ):
        assert wrong != pytest.approx(expected, rel=OTHER)
    protocol = results["protocol"]
    assert protocol["targets_per_window"] == WINDOW and protocol["tail"] == "a shorter window"
    assert protocol["compared_targets"] == {"wikitext2": len(ids) - 1}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["evaluate.protocol=wikitext2"], "evaluate.protocol"),
        (["evaluate.protocol=wikitext2-4096"], "evaluate.protocol = 'wikitext2-4096': its windows"),
        (["evaluate.text={folder}/absent.txt"], "absent.txt: does not exist. Set evaluate.text"),
        (["evaluate.text={folder}/short.txt"], "tokens, too few for one window of 2,048"),
        (["evaluate.text={folder}/empty.txt"], "empty.txt: holds no text. Set evaluate.text"),
        (
            [
                "evaluate.protocol=heldout",
                "data.domains.d={{kind: jsonl, path: {folder}/test.jsonl}}",
            ],
            "Set evaluate.protocol, for example wikitext2-2048",
        ),
    ],
)
def test_what_cannot_be_measured_is_said_before_the_weights_are_read(
    run: Run, words: list[str], says: str
) -> None:
    (run.folder / "short.txt").write_text("a few words")
    (run.folder / "empty.txt").write_text(" \n")
    given = [word.format(folder=run.folder) for word in words]
    done = in_process("evaluate", *run.words, *given)
    assert says in refusal(done) and "dense" not in done.stderr


def test_a_text_that_is_learned_from_is_warned_of(run: Run) -> None:
    domain = f"data.domains.d={{kind: jsonl, path: {run.folder / 'test.jsonl'}}}"
    said = here("evaluate", *run.words, domain, "evaluate.masks={}", "prune.methods=[]").stderr
    assert "test.jsonl is measured, and data.domains.d learns from it" in said
    assert "learns from it" not in here("evaluate", *run.words, "evaluate.masks={}").stderr
