"""Files that stand for the results of megamask's verbs in the tests of the study."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megamask.masks.file import save_masks
from megamask.sparsity.pattern import Pattern
from megamask.storage import write_json

REPO = Path(__file__).resolve().parents[3]
RECIPE = REPO / "configs" / "recipes" / "debug.yaml"
FINGERPRINT = "f" * 64
STEPS, BATCH, SEQ = 6, 4, 32
DENSE = {"code": 7.0, "prose": 13.0}
Words = Callable[..., list[str]]


def save_model(base: Path) -> None:
    """What a study reads of converted weights."""
    config = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "vocab_size": 50,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
    }
    write_json(base / "weights" / "config.json", config)
    write_json(base / "weights" / "megamask.json", {"fingerprint": FINGERPRINT})


def save_mask(path: Path, pattern: str, seed: int, method: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = Pattern.parse(pattern)
    scores = torch.rand(4, 32, generator=torch.Generator().manual_seed(seed))
    save_masks(
        path,
        {"model.layers.0.mlp.up_proj": chosen.best(scores)},
        chosen,
        fingerprint=FINGERPRINT,
        method=method,
    )
    if method != "learned":
        path.with_suffix(".margins").touch()  # where each weight starts


def learn(run_dir: Path, steps: int, seed: int, pattern: str) -> None:
    records: list[dict[str, Any]] = []
    seconds = 0.0
    for step in range(steps + 1):
        known = {"step": step, "tokens": step * BATCH * SEQ}
        if step:
            seconds += 3.0
            train = {"kind": "train", **known, "seconds": seconds}
            measured = {"signal_share": step / 100} if step % 2 == 0 else {}
            records.append({**train, "memory_gib": 1.5, "clip_factor": 0.5, **measured})
        if step in (0, steps // 2, steps):
            seconds += 10.0  # an evaluation comes after its step, and is no part of the next
            records.append(
                {
                    "kind": "evaluation",
                    **known,
                    "seconds": seconds,
                    "perplexity": {"code": 30.0 - step, "prose": 60.0},
                }
            )
    (run_dir / "learn" / "snapshots" / "step-1").mkdir(parents=True)
    (run_dir / "learn" / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records)
    )
    save_mask(run_dir / "masks" / "learned.safetensors", pattern, seed, "learned")


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(out.glob("runs/*/*/result.json"))]
