"""The runs of the study: a general mask of all domains, then two masks of each domain."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megamask.config import Config, load_config
from megamask.errors import ConfigError
from megamask.storage import read_json, write_json, write_text
from studies.child import AGAIN, link, locked, verb
from studies.command import check_base, check_heldout
from studies.given import LEARNING, MAKING, MEASURING, deciding, text_digests

STARTS = ("scratch", "transfer")  # from the one-shot mask, and from the general mask
FACTS = "domain.json"
# The layers of the dense model as a teacher give more from the same text. The masks of a domain
# follow them less, for they may become better than the dense model.
GENERAL_WORDS = ("learn.distillation.hidden=1",)
DOMAIN_WORDS = ("learn.distillation.hidden=0.25",)


@dataclass(frozen=True)
class Study:
    """What the command asks for.

    Attributes:
        base: a prepared run, whose ``hf`` and ``weights`` are read.
        out: where all runs go.
        recipe: domains and all other settings.
        settings: words ``key=value``, above the recipe.
        general_steps: of the mask of all domains.
        steps: of each mask of a domain.
        minutes: the longest time of a verb.
    """

    base: Path
    out: Path
    recipe: Path
    settings: tuple[str, ...]
    general_steps: int
    steps: int
    minutes: float

    @property
    def config(self) -> Config:
        """The settings of the run of all domains."""
        return load_config(self.recipe, list(self.settings))

    @cached_property
    def general(self) -> Path:
        """The run of all domains. Its name has a hash of what decides its masks, but for the text,
        of which the run itself makes shards.
        """
        return self.out / f"all-{_hash(self.deciding | {'steps': self.general_steps})}"

    def folder(self, domain: str) -> Path:
        """The runs of a domain, under the general mask and the steps that they stand on."""
        decides = {"general": self.general.name, "steps": self.steps, "words": DOMAIN_WORDS}
        return self.out / f"{domain}-{_hash(decides)}"

    @property
    def deciding(self) -> dict[str, Any]:
        """Model and settings."""
        weights = read_json(self.base / "weights" / "megamask.json", AGAIN)
        return {
            "model": weights["fingerprint"],
            "settings": deciding(self.config, (*MAKING, *LEARNING, *MEASURING)),
            "words": GENERAL_WORDS,
            "seed": self.config.seed,
        }

    @property
    def domains(self) -> list[str]:
        """Their names, in the order of the recipe."""
        return list(self.config.data.domains)


def check(study: Study) -> None:
    """Check the settings and the prepared run, before anything is made.

    Raises:
        ConfigError: fewer than two domains, no prior, or a base without model or weights.
    """
    config = study.config
    if len(study.domains) < 2:
        raise ConfigError("data.domains", study.domains, "two or more", "Add a domain.")
    if config.learn.prior.mask not in config.prune.methods:
        allowed = f"a method of prune.methods, here {', '.join(config.prune.methods)}"
        raise ConfigError("learn.prior.mask", config.learn.prior.mask, allowed, "Name it there.")
    check_heldout(config)
    check_base(study.base, ("hf", "weights"))


def run_general(study: Study) -> None:
    """Text of all domains, a one-shot mask and the general mask. The verbs themselves judge what is
    done already.
    """
    folder = study.general
    recipe = write_recipe(study, folder, study.domains)
    words = [f"run_dir={folder}", f"learn.steps={study.general_steps}", *GENERAL_WORDS]
    with locked(folder) as lock:
        for name in ("tokenize", "prune", "learn"):
            verb(name, recipe, words, folder, study.minutes, lock)


def run_domain(study: Study, domain: str) -> None:
    """Both masks of a domain, and the perplexity of all masks on its held-out text."""
    facts, folder = facts_of(study, domain), study.folder(domain)
    if results_of(study, domain):
        return
    masks = {
        study.config.learn.prior.mask: _general(study, f"{study.config.learn.prior.mask}"),
        "general": _general(study, "learned"),
    }
    for start in STARTS:
        run_dir = folder / start
        recipe = write_recipe(study, run_dir, [domain])
        prior = [f"learn.prior.mask={study.general / 'learn' / 'snapshots'}"]
        with locked(run_dir) as lock:
            words = [f"run_dir={run_dir}", f"learn.steps={study.steps}", *DOMAIN_WORDS]
            words += prior if start == "transfer" else []
            verb("learn", recipe, words, run_dir, study.minutes, lock)
        masks[start] = run_dir / "masks" / "learned.safetensors"
    recipe = write_recipe(study, folder, [domain])
    named = ", ".join(f"{name}: {path}" for name, path in masks.items())
    with locked(folder) as lock:
        words = [f"run_dir={folder}", f"evaluate.masks={{{named}}}"]
        verb("evaluate", recipe, words, folder, study.minutes, lock)
    evaluated = read_json(folder / "results.json", AGAIN)
    perplexity = {name: row[domain] for name, row in evaluated["perplexity"].items()}
    write_json(
        folder / FACTS, {**facts, "perplexity": perplexity, "protocol": evaluated["protocol"]}
    )


def facts_of(study: Study, domain: str) -> dict[str, Any]:
    """What decides the results of a domain."""
    config = study.config
    return {
        "domain": domain,
        "pattern": config.pattern,
        "steps": {"general": study.general_steps, **dict.fromkeys(STARTS, study.steps)},
        "tokens_per_step": config.learn.global_batch * config.data.seq_length,
        "stages": [*GENERAL_WORDS, *DOMAIN_WORDS],
        "digest": study.folder(domain).name,
        "text": text_of(study),
    }


def text_of(study: Study) -> dict[str, list[str]]:
    """The digests of the text of each domain that is there."""
    known = text_digests(study.general / "shards")
    return {domain: known[domain] for domain in study.domains if domain in known}


def results_of(study: Study, domain: str) -> dict[str, Any]:
    """What was found on a domain by this study; empty before, and where the study was another."""
    path = study.folder(domain) / FACTS
    known = dict(read_json(path, f"Delete it. {AGAIN}")) if path.exists() else {}
    return known if facts_of(study, domain).items() <= known.items() else {}


def write_recipe(study: Study, folder: Path, domains: list[str]) -> Path:
    """A recipe of ``domains`` alone beside links to model, weights, text and prior."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("hf", "weights"):
        link(study.base / name, folder / name)
    if folder != study.general:
        for domain in domains:
            link(study.general / "shards" / domain, folder / "shards" / domain)
        prior = study.config.learn.prior.mask
        for ending in ("safetensors", "margins"):
            link(_general(study, str(prior), ending), folder / "masks" / f"{prior}.{ending}")
    values = study.config.model_dump(mode="json")
    for key in ("domains", "blend"):
        values["data"][key] = {name: values["data"][key][name] for name in domains}
    path = folder / "recipe.yaml"
    write_text(path, json.dumps(values, indent=1))  # which is YAML too
    return path


def _general(study: Study, name: str, ending: str = "safetensors") -> Path:
    return study.general / "masks" / f"{name}.{ending}"


def _hash(decides: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:10]
