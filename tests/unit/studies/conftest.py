"""Command lines and stand-ins of megamask's verbs for the tests of the study."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamask.config import load_config
from megamask.storage import write_json
from studies import child
from studies.learners import __main__
from tests.unit.studies.stand_ins import (
    BATCH,
    DENSE,
    RECIPE,
    SEQ,
    STEPS,
    Words,
    learn,
    save_mask,
    save_model,
)


@pytest.fixture
def words(tmp_path: Path) -> Words:
    """``words(...)`` is a command line with more words; the base run has all files it needs."""
    base = tmp_path / "base"
    save_model(base)
    (base / "shards" / "prose").mkdir(parents=True)
    save_mask(base / "masks" / "sparsegpt.safetensors", "2:4", 0, "sparsegpt")

    def command(*more: str, steps: int = STEPS) -> list[str]:
        line = f"--base {base} --out {tmp_path / 'out'} --recipe {RECIPE} --seeds 7 --steps {steps}"
        line += f" --micro-batch 2 --tokens-per-step {BATCH * SEQ} --evaluate-tokens 128"
        return [*line.split(), *more]

    return command


@pytest.fixture
def verbs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins for the verbs that write the same files, and the list of the verbs that ran."""
    ran: list[str] = []

    def stand_in(
        name: str, recipe: Path, overrides: list[str], run_dir: Path, minutes: float, lock: int
    ) -> None:
        ran.append(name)
        config = load_config(recipe, overrides)
        if name == "prune":
            for method in config.prune.methods:
                save_mask(run_dir / "masks" / f"{method}.safetensors", config.pattern, 0, method)
        elif name == "learn":
            prior = run_dir / "masks" / f"{config.learn.prior.mask}.safetensors"
            assert config.learn.prior.mask is None or prior.exists()
            assert config.learn.prior.mask is None or prior.with_suffix(".margins").exists()
            learn(run_dir, config.learn.steps, config.seed, config.pattern)
        else:
            masks = config.evaluate.masks
            measured = {row: {"code": 11.0, "prose": 22.0 + config.seed} for row in masks}
            assert all(Path(path).exists() for path in masks.values())
            found = {
                "perplexity": {"dense": DENSE, **measured},
                "protocol": {"window": config.evaluate.window},
                "seconds": {},
            }
            write_json(run_dir / "results.json", found)

    monkeypatch.setattr(child, "verb", stand_in)
    return ran


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write no report, because a picture takes long."""
    monkeypatch.setattr(__main__, "write_report", lambda bench, folder: folder)
