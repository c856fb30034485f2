"""The inputs of a run: each is read and checked once, when it is first asked for, and handed on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megamask.config import Config, RunPaths, run_paths
from megamask.data.heldout import heldout_digests
from megamask.data.shards import check_vocabulary
from megamask.data.shared_text import check_shards
from megamask.errors import ConfigError
from megamask.masks.file import MaskSet
from megamask.masks.margins import Margins
from megamask.model.checkpoint import read_note
from megamask.prepare.content import Content
from megamask.prepare.layout import Layout, check_positions
from megamask.prepare.learned_text import warn_of_learned_text
from megamask.prepare.prior_mask import description, load_prior
from megamask.prepare.same_model import check_converted
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.pattern_plan import PatternPlan
from megamask.weights.architecture import Architecture, read_architecture
from megamask.weights.base_model import base_model
from megamask.weights.layer_plan import asked_patterns, layer_plan
from megamask.weights.model_identity import model_facts_of


@dataclass(frozen=True)
class RunInputs:
    """What a verb that computes on the converted model works from.

    Nothing is read when the object is made, so that a verb can refuse settings before it looks for
    files. Every attribute raises at its first use and is the same object ever after.

    Attributes:
        config: the settings.
    """

    config: Config

    @cached_property
    def paths(self) -> RunPaths:
        """The paths of the run."""
        return run_paths(self.config)

    @cached_property
    def layout(self) -> Layout:
        """The layout of the launched processes.

        Raises:
            ConfigError: see ``Layout.launched``.
        """
        return Layout.launched(self.config)

    @cached_property
    def patterns(self) -> list[Pattern]:
        """The patterns of the settings, each once; known before any file is read.

        Raises:
            ConfigError: see ``asked_patterns``.
        """
        return asked_patterns(self.config)

    @cached_property
    def note(self) -> dict[str, Any]:
        """What the verb convert wrote beside the weights.

        Raises:
            ArtifactError: there are no weights, or they were made of another model than that of
                the settings, which is still there.
        """
        note = read_note(self.paths.weights)
        check_converted(base_model(self.config), self.paths.weights, note)
        return note

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the dense weights. Raises as ``note``."""
        fingerprint: str = self.note["fingerprint"]
        return fingerprint

    @cached_property
    def arch(self) -> Architecture:
        """The architecture of the converted model.

        Raises:
            ArtifactError: its config.json is missing or names another kind of model.
        """
        keys = self.config.model.ignore_keys
        return read_architecture(self.paths.weights, keys, "Run the verb convert.")

    @cached_property
    def plan(self) -> PatternPlan:
        """The linears to prune, in model order, and their patterns.

        Raises:
            ConfigError: see ``layer_plan``.
        """
        return layer_plan(self.arch, self.config)

    @cached_property
    def modules(self) -> list[str]:
        """HF names of the linears to prune, in model order. Raises as ``plan``."""
        return [*self.plan]

    @property
    def facts(self) -> dict[str, Any]:
        """What all ranks must have found in the files, as JSON values: on a network file system one
        of them may see an older file. Raises as ``note`` and ``plan``.
        """
        weights = {key: self.note[key] for key in ("fingerprint", "dtype", "padded_vocab")}
        weights |= model_facts_of(self.note)
        return {"weights": weights, "pattern": self.plan.facts(), "linears": self.modules}

    def check_text(self) -> None:
        """Check that the model knows every token of the shards, that the shards were made from the
        corpora of the settings, and that no held-out text is learned from.

        Raises:
            ConfigError, ArtifactError: see :func:`megamask.data.shards.check_vocabulary` and
                :func:`megamask.data.shared_text.check_shards`.
        """
        check_vocabulary(self.config, self.arch.vocab)
        check_shards(self.config)


@dataclass(frozen=True)
class LearnInputs(RunInputs):
    """What a learning run works from: also the mask that it starts from."""

    @cached_property
    def prior(self) -> MaskSet | None:
        """The masks of ``learn.prior.mask``, which fit pattern, model and linears; None for none.

        Raises:
            ArtifactError, ConfigError: see :func:`megamask.prepare.prior_mask.load_prior`.
        """
        return load_prior(self.config, self.arch, self.fingerprint, self.plan)

    @cached_property
    def margins(self) -> Margins | None:
        """The margins of the prior; None where the run starts without.

        Raises:
            ArtifactError: the prior comes without margins. Raises as ``prior`` too.
        """
        wanted = self.config.learn.prior.margins
        return self.prior.margins() if self.prior is not None and wanted else None

    @property
    def prior_method(self) -> str | None:
        """How the prior was made. Raises as ``prior``."""
        return None if self.prior is None else description(self.prior, self.paths)

    @cached_property
    def content(self) -> Content:
        """Digests of what the run learns from.

        Raises:
            MegamaskError: shards or prior are missing, or do not fit.
        """
        return Content.of(self.config, self.prior, self.margins)

    @property
    def facts(self) -> dict[str, Any]:
        """Also the text, the tokenizer and the prior, by content. Raises as ``content`` too."""
        heldout = heldout_digests(self.config)
        return {**super().facts, "content": self.content.note(), "held-out text": heldout}

    def check(self) -> None:
        """Read everything but the weights, and check that it fits together.

        Raises:
            MegamaskError: the first input that is missing, torn or does not fit.
        """
        _ = self.note
        check_positions(self.config, self.arch, ("data.seq_length", "evaluate.window"))
        _check_top_k(self.config, self.arch)
        self.layout.check_linears(self.config, self.arch, self.plan)
        _ = self.content
        self.check_text()
        if self.prior is not None:
            warn_of_learned_text(self.config, {f"the prior {self.prior_method}": self.prior})


def _check_top_k(config: Config, arch: Architecture) -> None:
    top_k = config.learn.distillation.top_k
    if config.learn.distillation.share and top_k and top_k > arch.vocab:
        allowed = f"at most {arch.vocab:,}, the vocabulary of the model"
        raise ConfigError("learn.distillation.top_k", top_k, allowed, "Lower it, or set null.")
