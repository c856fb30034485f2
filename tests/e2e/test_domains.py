"""A run as the field sets it up: learning on web text and on Megatron's own shards, evaluation on
another domain, with a tokenizer that puts a BOS before each prompt.
"""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megamask.masks.file import load_masks
from tests.e2e.conftest import code, prose
from tests.e2e.program import here

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
BOS_TOKEN = "<s>"


@pytest.fixture(scope="module")
def bos_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The model with a tokenizer like Llama's, and the id of the BOS."""
    from tokenizers import Tokenizer, processors

    folder = tmp_path_factory.mktemp("bos") / "model"
    shutil.copytree(model, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos = tokenizer.token_to_id(BOS_TOKEN)
    assert bos is not None
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A", special_tokens=[(BOS_TOKEN, bos)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder, bos


def write_web(folder: Path) -> None:
    """Two files as C4 and SlimPajama have them, and their card."""
    rows = [json.dumps({"text": code(number), "url": "x"}) + "\n" for number in range(30)]
    (folder / "en").mkdir(parents=True)
    first = folder / "en" / "c4-train.00000-of-00002.json.gz"
    first.write_bytes(gzip.compress("".join(rows[:15]).encode()))
    second = folder / "example_train_0.jsonl.zst"
    second.write_bytes(pyarrow.compress("".join(rows[15:]).encode(), codec="zstd", asbytes=True))
    (folder / "README.md").write_text("a card")


def write_megatron(prefix: Path, model: Path, bos: int) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for number in range(100, 120):
        ids = [*tokenizer(code(number))["input_ids"], tokenizer.eos_token_id]
        assert ids[0] == bos
        builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")


def test_learning_on_some_domains_and_evaluation_on_another(
    tmp_path: Path, bos_model: tuple[Path, int]
) -> None:
    import pyarrow.parquet as parquet

    model, bos = bos_model
    write_web(tmp_path / "web")
    write_megatron(tmp_path / "code_text_document", model, bos)
    wiki = pyarrow.table({"text": [prose(number) for number in range(20)]})
    parquet.write_table(wiki, tmp_path / "test-00000-of-00001.parquet")
    run_dir = tmp_path / "run"
    words = [
        f"run_dir={run_dir}",
        f"model.hf={model}",
        f"data.domains.web={{kind: files, path: {tmp_path / 'web'}, heldout: 0}}",
        f"data.domains.shards={{kind: megatron, path: {tmp_path}/code_text_document, heldout: 0}}",
        f"data.domains.prose={{kind: parquet, path: {tmp_path}/*.parquet, heldout: 1}}",
        "data.domains.prose.max_bytes=null",
        "prune.methods=[magnitude, wanda]",
        "learn.prior.mask=wanda",
    ]
    for verb in ("convert", "tokenize", "prune", "learn", "evaluate", "export", "report"):
        here(verb, *words)
    here("plan", *words)
    results = json.loads((run_dir / "results.json").read_text())
    rows = results["perplexity"]
    assert set(rows) == {"dense", "magnitude", "wanda", "learned"}
    assert all(set(row) == {"prose"} for row in rows.values())
    assert results["protocol"]["bos"].startswith("one at the start of each window")
    assert "prose" in (run_dir / "report.html").read_text()
    made_from = load_masks(run_dir / "masks" / "wanda.safetensors").meta["data"]["calibration"]
    assert set(made_from["blend"]) == {"web", "shards"} and made_from["bos"] == bos
    lines = (run_dir / "learn" / "metrics.jsonl").read_text().splitlines()
    assert not any("web" in line or "shards" in line for line in lines)  # nothing is held out
    evaluations = [one for one in map(json.loads, lines) if "perplexity" in one]
    assert evaluations and all(set(one["perplexity"]) == {"prose"} for one in evaluations)
    again = here("tokenize", *words)
    assert again.stderr.count("kept") == 3
