"""A snapshot of learning read as masks: the hard masks of its mask logits.

Snapshots of every distribution, method and layout can be read. Reading needs neither Megatron-Core
nor a process group.

Shapes: O out_features, I in_features, L logits a group, G groups per row.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from megamask.config.changed import read_changes, write_changes
from megamask.config.legacy import upgrade_note
from megamask.config.method_names import DISTRIBUTION_OF
from megamask.errors import ArtifactError, ConfigError
from megamask.masks.file import MaskSet
from megamask.masks.margins import Margins
from megamask.masks.snapshot_steps import snapshot_path, snapshot_step, snapshot_steps
from megamask.safe_checkpoint import NOTE, read_index, unreadable
from megamask.sparsity.distribution import Distribution
from megamask.sparsity.distributions import DISTRIBUTIONS
from megamask.sparsity.margins import to_codes, to_levels
from megamask.sparsity.pattern_plan import PatternPlan
from megamask.storage import lacks, read_object, real_path
from megamask.weights.architecture import Architecture
from megamask.weights.layer_plan import patterns_of
from megamask.weights.mapping import linear_shapes, rules
from megamask.weights.rule import Rule

BLEND, OVERRIDDEN = "data.blend.", "pattern_overrides."
SAMPLES, SAMPLE_BYTES = 16, 2**16  # that the digest of a snapshot reads of each file
LOGITS = ".mask_logits"  # end of the name of a tensor of mask logits


class SnapshotMasks(MaskSet):
    """The hard masks of a snapshot, by HF module name.

    The logits of a linear are read when one of its masks is read; only the masks of the latest
    Megatron linear stay in memory.
    """

    def __init__(
        self,
        path: Path,
        meta: dict[str, Any],
        plan: PatternPlan,
        distribution: Distribution,
        index: Metadata,
        table: Mapping[str, Rule],
    ) -> None:
        super().__init__(path, None, meta, plan)
        self._distribution, self._index = distribution, index
        self._rules = {name: rule for rule in table.values() for name in rule.modules}
        self._latest: tuple[Rule | None, dict[str, Tensor]] = (None, {})

    def __getitem__(self, name: str) -> Tensor:
        rule = self._rules[name]
        if self._latest[0] is not rule:
            logits_OLG, pattern = self._logits(_key(rule)), self.patterns[name]
            parts = rule.to_hf(self._distribution.hard_mask(logits_OLG, pattern))
            self._latest = rule, {hf.rpartition(".")[0]: part for hf, part in parts.items()}
        return self._latest[1][name]

    def margins(self) -> Margins:
        """The margins of the logits."""
        return SnapshotMargins(self)

    @property
    def has_margins(self) -> bool:
        """Yes: the logits have them."""
        return True

    def levels_of(self, name: str) -> Tensor:
        """The levels of a linear's margins, (O, I) uint8."""
        rule = self._rules[name]
        pattern = self.patterns[name]
        scores_OI = self._distribution.scores(self._logits(_key(rule)), pattern)
        part_OI = rule.to_hf(scores_OI)[f"{name}.weight"]
        return to_levels(to_codes(part_OI, self[name], pattern))

    def narrow_index(self, name: str) -> Tensor:
        """Candidate index of every group, (O, G), in the smallest integers that hold it."""
        pattern = self.patterns[name]
        return torch.from_numpy(pattern.index_of_bits(pattern.bits_of(self[name])))

    @property
    def content_sha256(self) -> str:
        """Digest of the names, sizes and samples of the snapshot's files, 16 x 64 KiB of each: to
        read all logits would take as long as to learn a step.
        """
        digest = hashlib.sha256()
        for file in sorted(self.path.iterdir()):
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}:".encode())
            with file.open("rb") as stream:
                for place in range(SAMPLES):
                    stream.seek(place * size // SAMPLES)
                    digest.update(stream.read(SAMPLE_BYTES))
        return digest.hexdigest()

    def check_whole(self) -> None:
        """Check nothing: the sizes of the files were compared when the snapshot was opened."""

    @property
    def size(self) -> int:
        """Bytes on disk, optimizer state included."""
        return sum(file.stat().st_size for file in self.path.iterdir())

    def _logits(self, key: str) -> Tensor:
        """Mask logits (O, L, G) of a Megatron linear."""
        saved = self._index.state_dict_metadata[key]
        assert isinstance(saved, TensorStorageMetadata)  # checked when the snapshot was opened
        logits_OLG = torch.empty(saved.size, dtype=saved.properties.dtype)
        try:
            with warnings.catch_warnings():
                # The library warns that it loads in a single process, which is intended.
                warnings.simplefilter("ignore", UserWarning)
                load({key: logits_OLG}, storage_reader=FileSystemReader(self.path), no_dist=True)
        # CheckpointException is no subclass of Exception.
        except (Exception, CheckpointException) as error:
            if not self.path.exists():
                problem = "was deleted while it was read: a run that learns keeps its newest alone"
                fix = "Write it to a mask file first (megamask extract), and name that."
                raise ArtifactError(self.path, problem, fix) from error
            raise unreadable(self.path, error, _fix(self.path)) from error
        return logits_OLG


class SnapshotMargins(Margins):
    """The margins of a snapshot, from its logits: what a run has learned is the prior of the next
    run, with the degrees of its certainty.
    """

    def __init__(self, masks: SnapshotMasks) -> None:
        self._masks = masks

    def levels(self, name: str) -> Tensor:
        """The levels of a linear, from its logits."""
        return self._masks.levels_of(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    @property
    def content_sha256(self) -> str:
        """The digest of the snapshot, which holds both."""
        return self._masks.content_sha256


def newest_snapshot(folder: Path) -> Path:
    """``folder`` itself if it is a snapshot, else the newest snapshot in it.

    Raises:
        ArtifactError: the folder holds no snapshot.
    """
    if snapshot_step(real_path(folder)) is not None:
        return folder
    steps = snapshot_steps(folder)
    if not steps:
        below = folder / "learn" / "snapshots"
        fix = "Name RUN/learn/snapshots (the newest), one RUN/learn/snapshots/step-NNNNNNNN"
        if below.is_dir():
            fix = f"Name {below}"
        fix += ", or a mask file RUN/masks/NAME.safetensors."
        raise ArtifactError(folder, "is a folder without snapshots", fix)
    return snapshot_path(folder, steps[-1])


def load_snapshot(folder: Path, arch: Architecture) -> SnapshotMasks:
    """Open a snapshot as masks.

    Args:
        folder: a snapshot, or a folder of snapshots, of which the newest is opened.
        arch: architecture of the model that the snapshot was learned on.

    Raises:
        ArtifactError: there is no snapshot, it is torn, or its logits do not fit the model.
    """
    path = newest_snapshot(folder)
    required = {"settings": dict, "fingerprint": str, "progress": {"step": int}}
    note = read_object(path / NOTE, _fix(path), required)
    index = read_index(path, _fix(path))
    try:
        settings = upgrade_note(note["settings"])
        fingerprint, step = note["fingerprint"], note["progress"]["step"]
        pattern = str(settings["pattern"])
        overrides = {
            key.removeprefix(OVERRIDDEN): str(text)
            for key, text in settings.items()
            if key.startswith(OVERRIDDEN)
        }
        plan = patterns_of(arch, pattern, overrides, linear_shapes(arch))
        distribution = DISTRIBUTIONS[
            note.get("distribution") or DISTRIBUTION_OF[settings["learn.method"]]
        ]
    except (AttributeError, KeyError, TypeError, ConfigError) as error:
        raise ArtifactError(
            path / NOTE, f"is not the note of a snapshot ({error!r})", _fix(path)
        ) from None
    table = {
        _key(rule): rule
        for rule in rules(arch)
        if rule.is_linear and _key(rule) in index.state_dict_metadata
    }
    _check_shapes(path, index, table, plan, distribution)
    shapes = {
        name: {"shape": list(shape)}
        for rule in table.values()
        for name, shape in zip(rule.modules, rule.shapes, strict=True)
    }
    says_text = not lacks(note, {"content": {"text": dict}})
    data = {
        "snapshot": str(path),
        "step": step,
        "distribution": distribution.name,
        "blend": {
            key.removeprefix(BLEND): share
            for key, share in settings.items()
            if key.startswith(BLEND)
        },
        **({"text_sha256": note["content"]["text"]} if says_text else {}),
        **write_changes(read_changes(note)),
    }
    own = PatternPlan({name: plan[name] for name in shapes})
    meta = {
        "pattern": str(own),
        "fingerprint": fingerprint,
        "float16_fingerprints": note.get("float16_fingerprints"),
        "method": "learned",
        "data": data,
        "tensors": shapes,
    }
    return SnapshotMasks(path, meta, own, distribution, index, table)


def _key(rule: Rule) -> str:
    return rule.megatron.removesuffix(".weight") + LOGITS


def _check_shapes(
    path: Path,
    index: Metadata,
    table: Mapping[str, Rule],
    plan: PatternPlan,
    distribution: Distribution,
) -> None:
    """Check the shape of all mask logits against the model's linears and their patterns."""
    fix = "Use a snapshot that was learned on this model."
    saved = {
        key: entry
        for key, entry in index.state_dict_metadata.items()
        if key.endswith(LOGITS) and not key.startswith("optimizer.")
    }
    if not saved:
        raise ArtifactError(path, "holds no mask logits", fix)
    for key, entry in saved.items():
        if key not in table:
            raise ArtifactError(path, f"holds {key}, which the model does not have", fix)
        (rows, columns), pattern = table[key].shape(), plan[table[key].modules[0]]
        width = distribution.logits_per_group(pattern)
        shape = list(entry.size) if isinstance(entry, TensorStorageMetadata) else None
        if columns % pattern.m or shape != [rows, width, columns // pattern.m]:
            problem = (
                f"holds {key} of shape {shape}, "
                f"which does not fit {rows} x {columns} weights of the model"
            )
            raise ArtifactError(path, problem, fix)


def _fix(path: Path) -> str:
    return f"Name another snapshot in {path.parent}, or a mask file of that run."
