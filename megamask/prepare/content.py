"""What a learning run learns from, by content: text, tokenizer and prior, in place of their paths.

The digests are cheap, because each was computed when its file was written: the verb tokenize writes
the SHA-256 of the shards beside them, and a mask file holds the SHA-256 of its masks. Sizes are
compared when the files are opened. A shard that is changed in place with its size kept is not
noticed here. The model has a fingerprint of its own (``megamask.weights.fingerprint``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from megamask.config import Config, run_paths
from megamask.data.blend import blend_weights
from megamask.data.shards import read_shards
from megamask.data.split import TRAIN
from megamask.errors import ArtifactError, ConfigError
from megamask.masks.file import MaskSet
from megamask.masks.margins import Margins
from megamask.storage import lacks

AFRESH = "Or use another run_dir, or start over with learn.resume=false."
_NOTE = {"text": dict, "tokenizer": dict, "prior": (str, NoneType)}


@dataclass(frozen=True)
class Content:
    """Digests of the inputs of a learning run.

    Attributes:
        text: domain to learn from -> digest of its training tokens.
        tokenizer: domain -> fingerprint of the tokenizer that made them.
        prior: digest of the masks that learning starts from, or of the margins and the masks
            that they belong to; None without a prior.
    """

    text: dict[str, str]
    tokenizer: dict[str, str]
    prior: str | None

    @classmethod
    def of(cls, config: Config, prior: MaskSet | None, margins: Margins | None) -> Content:
        """The content of the configured inputs.

        Raises:
            MegamaskError: the blend or a domain's shards do not fit.
        """
        folder = run_paths(config).shards
        shards = {domain: read_shards(folder / domain) for domain in blend_weights(config)}
        return cls(
            {domain: one.content_sha256(TRAIN) for domain, one in shards.items()},
            {domain: one.meta["tokenizer"]["fingerprint"] for domain, one in shards.items()},
            None if prior is None else (margins or prior).content_sha256,
        )

    def note(self) -> dict[str, Any]:
        """The digests as JSON values."""
        return asdict(self)

    def check_same(self, note: Mapping[str, Any], snapshot: Path, config: Config) -> None:
        """Check that a run goes on with what it was learned from.

        Args:
            note: as ``note`` returned it when the snapshot was saved.
            snapshot: for messages.
            config: the settings, which name the inputs of today.

        Raises:
            ArtifactError: the note is torn, or text or tokenizer have another content.
            ConfigError: other domains are blended, or the prior has another content.
        """
        if problem := lacks(note, _NOTE, "content"):
            raise ArtifactError(snapshot, problem, f"Delete this snapshot. {AFRESH}")
        if list(note["text"]) != list(self.text):  # their order decides that of the samples
            allowed = f"{snapshot} was learned from {', '.join(note['text']) or 'no domain'}"
            fix = "Name these domains in data.blend, in this order in data.domains."
            raise ConfigError("data.blend", ", ".join(self.text), allowed, f"{fix} {AFRESH}")
        shards = run_paths(config).shards
        for domain in self.text:
            if note["tokenizer"].get(domain) != self.tokenizer[domain]:
                problem = f"was made with another tokenizer than the text of {snapshot}"
                fix = f"Set data.tokenizer to the former tokenizer and run tokenize. {AFRESH}"
                raise ArtifactError(shards / domain, problem, fix)
            if note["text"][domain] != self.text[domain]:
                problem = f"holds other text than {snapshot} was learned from"
                fix = f"Restore the corpus of {domain} and run the verb tokenize. {AFRESH}"
                raise ArtifactError(shards / domain, problem, fix)
        if note["prior"] != self.prior:
            allowed = f"{snapshot} started from {'other masks' if note['prior'] else 'no prior'}"
            fix = "Name the former prior (a folder of snapshots means its newest: name the step)."
            fix = f"{fix} {AFRESH}"
            raise ConfigError("learn.prior.mask", config.learn.prior.mask, allowed, fix)

    def check_without_bos(self, snapshot: Path, config: Config) -> None:
        """Check that no document begins with a BOS, as before there was ``data.bos``.

        Args:
            snapshot: of a run from before, for messages.
            config: the settings, which name the shards of today.

        Raises:
            ConfigError: the shards of a domain begin their documents with a BOS.
        """
        folder = run_paths(config).shards
        for domain in self.text:
            if read_shards(folder / domain).begin_with_bos:
                allowed = f"{snapshot} was learned from {domain} without BOS"
                fix = f"Set data.bos=false and run the verb tokenize. {AFRESH}"
                raise ConfigError("data.bos", config.data.bos, allowed, fix)
