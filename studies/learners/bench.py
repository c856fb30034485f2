"""The folders and the common settings of a comparison.

    OUT/base.json                  settings of the recipe except ``learn``
    OUT/oneshot/PATTERN-HASH/      one-shot masks, shared by all arms of a pattern
    OUT/runs/ARM-HASH/SEED/        a run directory of megamask; it also gets learned.json after
                                   ``learn`` and result.json after ``evaluate``
    OUT/times/ARM-HASH.json        seconds of a step, measured separately (``--time``)

HASH covers model, text and the settings that decide what is learned, without the seed. So other
settings give another folder, and two arms with equal settings share a folder.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megamask.config import Config, load_config
from megamask.errors import ArtifactError
from megamask.optim.schedule import learning_rates
from megamask.report.reading import Record
from megamask.storage import read_json, write_json
from studies import child
from studies.child import AGAIN
from studies.given import LEARNING, MAKING, deciding, text_digests
from studies.learners.arm import Arm, Settings

# Held-out windows a domain while learning; the final masks are evaluated on more.
CURVE_WINDOWS = 12


@dataclass(frozen=True)
class Budget:
    """The limits that are the same for every arm.

    Attributes:
        steps: steps of learning.
        micro_batch, global_batch: sequences.
        evaluate_every: steps between two points of the curve.
        evaluate_tokens: held-out tokens of each domain for the final masks.
        minutes: longest time of a verb.
    """

    steps: int
    micro_batch: int
    global_batch: int
    evaluate_every: int
    evaluate_tokens: int
    minutes: float

    def settings(self, share_of_steps: float = 1.0) -> Settings:
        """The budget as settings of megamask."""
        return {
            "steps": max(1, round(self.steps * share_of_steps)),
            "micro_batch": self.micro_batch,
            "global_batch": self.global_batch,
            "snapshot.every": max(1, min(100, self.steps // 3)),
            "snapshot.keep": 1,
            "monitor.evaluate_every": self.evaluate_every,
            "monitor.evaluate_windows": CURVE_WINDOWS,
            "evaluate.max_tokens": self.evaluate_tokens,
            "monitor.sinks": [],
        }


@dataclass(frozen=True)
class Bench:
    """The folders of a comparison, and the settings that all arms share.

    Args:
        out: the folder of all results.
        base: a run directory with ``weights`` and ``shards``. Its ``hf`` and its one-shot masks are
            used too, if it has them.
        budget: steps and batch.
        extra: ``key=value`` for every arm; the settings of an arm come later and win.
    """

    out: Path
    base: Path
    budget: Budget
    extra: tuple[str, ...] = ()

    @property
    def recipe(self) -> Path:
        """The file of the settings that are not about learning."""
        return self.out / "base.json"

    def prepare(self, recipe: Path) -> None:
        """Check the base and write ``base.json``.

        Raises:
            MegamaskError: the recipe cannot be read, or the base run has no weights or shards.
        """
        for name in ("weights", "shards"):
            if not (self.base / name).is_dir():
                raise ArtifactError(
                    self.base / name,
                    "is missing",
                    "Name a prepared run with --base: ./launch/quickstart.sh makes one.",
                )
        settings = load_config(recipe).model_dump(mode="json", exclude_unset=True)
        for section in ("run_dir", "learn"):
            settings.pop(section, None)
        write_json(self.recipe, settings)

    def overrides(self, arm: Arm, run_dir: Path, seed: int) -> list[str]:
        """The overrides of the recipe that make it this arm; later words win."""
        common = {
            **(arm.common or {}),
            **self.budget.settings(arm.share_of_steps),
        }
        own = {**arm.settings}
        if arm.batch != 1:
            own["global_batch"] = arm.batch * self.budget.global_batch
        words = [
            f"pattern={arm.pattern}",
            *map(_word, common.items()),
            *self.extra,
            *map(_word, own.items()),
        ]
        if arm.rate != 1:
            derived = learning_rates(load_config(self.recipe, words))
            names = ("optimizer.lr", "optimizer.min_lr")
            rates = (float(f"{arm.rate * rate:.3g}") for rate in derived)
            words += map(_word, zip(names, rates, strict=True))
        return [*words, f"seed={seed}", f"run_dir={run_dir}"]

    def config(self, arm: Arm, run_dir: Path = Path("runs/arm"), seed: int = 0) -> Config:
        """The checked settings of an arm.

        Raises:
            ConfigError: a setting does not exist or cannot work.
        """
        return load_config(self.recipe, self.overrides(arm, run_dir, seed))

    def digest(self, arm: Arm) -> str:
        """Hash of the model, of the text and of the settings that decide what is learned."""
        config = self.config(arm)
        given = deciding(config, (*MAKING, *LEARNING * arm.learns))
        if arm.learns:
            given["rates"] = learning_rates(config)  # derived, so they are not given
        return self._hash(given)

    def _hash(self, given: Record) -> str:
        model = read_json(self.base / "weights" / "megamask.json", "Run the verb convert.")[
            "fingerprint"
        ]
        decides = [model, self.text, given]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:10]

    @cached_property
    def text(self) -> dict[str, list[str]]:
        """Digests of the text, by domain."""
        return text_digests(self.base / "shards")

    def folder(self, arm: Arm) -> Path:
        """The folder of the seeds of an arm; an arm with equal settings may have made it."""
        digest, runs = self.digest(arm), self.out / "runs"
        made = sorted(runs.glob(f"*-{digest}"))
        return made[0] if made else runs / f"{arm.name}-{digest}"

    def oneshot(self, arm: Arm) -> Path:
        """Run directory of the one-shot masks of an arm's pattern."""
        given = deciding(self.config(arm), MAKING)
        return self.out / "oneshot" / f"{arm.pattern.replace(':', 'of')}-{self._hash(given)}"

    def verb(self, name: str, overrides: list[str], run_dir: Path, lock: int) -> None:
        """Run a verb of megamask to its end.

        Raises:
            ArmError: the verb failed, or was not done in time.
        """
        child.verb(name, self.recipe, overrides, run_dir, self.budget.minutes, lock)

    def results(self, arm: Arm) -> list[Record]:
        """The results of an arm, one for each seed."""
        paths = (
            sorted(self.folder(arm).glob("*/result.json"))
            if arm.learns
            else [self.oneshot(arm) / "result.json"]
        )
        known = [read_json(path, f"Delete it. {AGAIN}") for path in paths if path.exists()]
        return [
            result
            for result in known
            if result["protocol"] == self.protocol(arm) and result["digest"] == self.digest(arm)
        ]

    def is_done(self, arm: Arm, seed: int) -> bool:
        """Whether this seed has its result."""
        return any(not arm.learns or result["seed"] == seed for result in self.results(arm))

    def protocol(self, arm: Arm) -> Record:
        """How the final masks are evaluated.

        Another protocol makes the study evaluate again, but not learn again.
        """
        section = self.config(arm).evaluate
        return {"window": section.window, "max_tokens": section.max_tokens, "bos": section.bos}


def _word(setting: tuple[str, Any]) -> str:
    key, value = setting
    section = "" if key.split(".")[0] in Config.model_fields else "learn."
    return f"{section}{key}={value if isinstance(value, str) else json.dumps(value)}"
