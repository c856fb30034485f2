"""Results and cards that were changed by hand are shown or refused, and never end a push."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from megamask.config import build_config, run_paths
from megamask.evaluate.rows import mask_digests
from megamask.masks.file import load_masks, save_masks
from megamask.publish.base_facts import base_facts
from megamask.publish.measured import measured, table_of
from megamask.sparsity.pattern import Pattern
from tests.fuzz.mutations import bytes_writer, json_writer, survives


def test_results(tmp_path: Path) -> None:
    path = tmp_path / "masks" / "learned.safetensors"
    save_masks(
        path, {"a": Pattern(2, 4).best(torch.rand(4, 8))}, "2:4", fingerprint="f", method="learned"
    )
    masks, paths = load_masks(path), run_paths(build_config({"run_dir": str(tmp_path)}))
    made = mask_digests({"learned": masks})
    rows = {"dense": {"code": 7.0}, "learned": {"code": 9.0}}
    results = {"perplexity": rows, "kl": rows, "masks": made, "protocol": {"name": "heldout"}}
    tasks = {
        "tasks": {"dense": {"piqa": {"acc": 0.5}}, "learned": {"piqa": {"acc": 0.4}}},
        "groups": {"all": ["piqa"]},
        "protocol": {"harness": "0.4.13"},
        "masks": made,
    }

    def show() -> None:
        for name, content in measured(paths, masks, {}).items():
            assert table_of(name, content)

    for file, content in (("results.json", results), ("tasks.json", tasks)):
        survives(show, json_writer(tmp_path / file, content), count=300)
        (tmp_path / file).unlink()


def test_cards_of_base_models(tmp_path: Path) -> None:
    text = b"---\nlicense: mit\nlicense_name: 2020-01-01\ntags:\n- a\n- {b: 1e9}\n---\n# x\n"
    write = bytes_writer(tmp_path / "README.md", text)
    for seed in range(300):
        write(random.Random(seed))
        assert all(isinstance(one, str) for one in base_facts(tmp_path, None).licence.values())
