"""Resumable learning state: mask logits, optimizer moments, progress. TP-independent, atomic, the
last k kept.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megamask import storage
from megamask.config import Config
from megamask.config.changed import Changed, read_changes, write_changes
from megamask.config.deciding import LEARN, deciding_settings, settings_of_role
from megamask.config.legacy import upgrade_note
from megamask.errors import ArtifactError, ConfigError
from megamask.learn.learner import Learner
from megamask.learn.masked_model import MaskedModel
from megamask.learn.methods import find_method
from megamask.learn.preflight import learning_changes
from megamask.leftovers import remove_leftovers, temporary_name
from megamask.masks.snapshot_steps import snapshot_path, snapshot_steps
from megamask.masks.times import times_path
from megamask.model.background_save import BackgroundSave
from megamask.model.checkpoint import load_sharded, save_sharded, sharded_state
from megamask.parallel.mesh import Mesh
from megamask.prepare.content import Content
from megamask.process.holder import utc_now
from megamask.safe_checkpoint import NOTE
from megamask.weights.model_identity import OTHER_PARTS, is_model_of

log = logging.getLogger(__name__)
LAUNCH = "MEGAMASK_LAUNCH"  # variable: the name of all starts of a job, or of one torchrun
STARTED_OVER = "started-over.json"  # the launch that put the snapshots of the run before aside
OF_A_RUN = ("metrics.jsonl", "config.yaml", "versions.json", "changes.json")
STEPS, WARMUP = "learn.steps", "learn.optimizer.warmup_steps"
DERIVED = "derived"  # key of a note: settings that were not given, and what followed from others
WINDOWS = "measured_on"  # field of Progress that older notes do not have
MODEL_PATHS = ("model.hf", "model.gguf")  # the digest of the model stands for their content


@dataclass
class Progress:
    """Where a run stands: what cannot be read off the logits.

    Attributes:
        step: how many steps were learned.
        best_score: the lowest mean log perplexity that was finite; None where there is none.
        best_step: after which step it was measured.
        measured_on: digest of the windows that the score was measured on; "" where a note of an
            older version does not say.
    """

    step: int = 0
    best_score: float | None = None
    best_step: int = 0
    measured_on: str = ""

    @classmethod
    def read(cls, note: dict[str, Any]) -> Progress:
        """From the note of a snapshot. The notes of older versions hold more, which is left out.

        Raises:
            TypeError: the note holds something else than numbers.
        """
        step, best_step, score = (note.get(key) for key in ("step", "best_step", "best_score"))
        if not (type(step) is int and type(best_step) is int and step >= 0):
            raise TypeError(f"step {step!r} and best step {best_step!r} are no numbers of steps")
        if score is not None and not isinstance(score, int | float):
            raise TypeError(f"the best score {score!r} is no number")
        best, windows = score if score is None or math.isfinite(score) else None, note.get(WINDOWS)
        return cls(step, best, best_step, windows if isinstance(windows, str) else "")


class Snapshots:
    """The snapshots of one run, in ``folder``/step-NNNNNNNN.

    Attributes:
        content: digests of the inputs, for the notes; None leaves text and prior unchecked.
        masks: the mask files that the run writes, and a run before it may have written.
        expect: called before each snapshot that is waited for or written, so that each has the
            whole time of a watchdog.
        changes: the settings that resumed runs changed, oldest first.
        background: the snapshot that is being written beside learning.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        mesh: Mesh,
        masked_model: MaskedModel,
        learner: Learner,
        content: Content | None = None,
        masks: Sequence[Path] = (),
        expect: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.config, self.content, self.masks = folder, config, content, masks
        self.mesh, self.masked_model, self.learner = mesh, masked_model, learner
        self.expect, self.method = expect, find_method(config.learn.method)
        self.changes: list[Changed] = []
        self.background = BackgroundSave(mesh)
        if mesh.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder, is_alone=True)
        mesh.barrier()

    def save(self, progress: Progress) -> None:
        """Write a snapshot, then delete all but the last ``learn.snapshot.keep``."""
        self.settle()
        self.expect()
        save_sharded(self._state(), self._path(progress), self.mesh, self._note(progress))
        if self.mesh.is_main:
            self._delete_old()
        self.mesh.barrier()

    def begin(self, progress: Progress) -> None:
        """Begin to write a snapshot beside the next steps, where ``learn.snapshot.background`` asks
        for it; else as ``save``. A snapshot that is being written still is waited for.
        """
        if not self.config.learn.snapshot.background:
            self.save(progress)
            return
        self.settle()
        self.expect()
        state, note = self._state(), self._note(progress)
        self.background.start(state, self._path(progress), note, self._delete_old)

    def settle(self) -> None:
        """Wait for the snapshot that is being written, if there is one."""
        self.expect()
        self.background.proceed(wait=True)

    def _path(self, progress: Progress) -> Path:
        return snapshot_path(self.folder, progress.step)

    def _note(self, progress: Progress) -> dict[str, Any]:
        return {
            "progress": asdict(progress),
            "settings": deciding_settings(self.config, LEARN),
            "fingerprint": self.masked_model.fingerprint,
            "float16_fingerprints": list(self.masked_model.float16_fingerprints),
            **self.masked_model.digest,
            "distribution": self.method.distribution.name,
            DERIVED: self.method.derived(self.config),
            **({} if self.content is None else {"content": self.content.note()}),
            **write_changes(self.changes),
        }

    def _delete_old(self) -> None:
        """Delete all but the last ``learn.snapshot.keep``.

        A file system may refuse, for example while another program reads the snapshot over NFS.
        What stays goes after the next snapshot: a whole one under its name, a part of one under a
        temporary name, so that nobody takes it for a snapshot.
        """
        with suppress(OSError):
            for old in self.steps()[: -self.config.learn.snapshot.keep]:
                path = snapshot_path(self.folder, old)
                path.rename(temporary_name(path))
        with suppress(OSError):
            remove_leftovers(self.folder, is_alone=True)

    def restore(self) -> Progress:
        """Load the newest snapshot into logits and optimizer; a fresh Progress when there is none.

        With ``learn.resume=false`` the snapshots and masks of the run before are put aside: among
        those of a new run the newest would not be its own, and its masks would pass for those of
        the new run. A launch does so once: its later starts, after a
        requeue by Slurm or a restart by torchrun, resume. The launch scripts name it in the
        variable MEGAMASK_LAUNCH, and a start without a name is a launch of its own.

        Settings that every step reads anew may differ: the log warns, and ``changes`` records each
        change. Where all steps were learned already, no step is left that could read them: fewer
        steps change nothing, and every other change is refused.

        Raises:
            ConfigError: the snapshot was made under other settings, or nothing would read a change.
            ArtifactError: it is torn, or belongs to another model, text, tokenizer or prior.
        """
        newest = self.newest()
        if not self.config.learn.resume and not self._has_started_over():
            self._start_over(newest is not None)
            return Progress()
        if newest is None:
            return Progress()
        path = snapshot_path(self.folder, newest)
        fix = f"Delete {path} to resume from the one before, or all of {self.folder} to start over."
        required = {"progress": dict, "fingerprint": str, "settings": dict}
        note = storage.read_object(path / NOTE, fix, required)
        self.mesh.require_same("snapshot", note)
        try:
            progress = Progress.read(note["progress"])
            settings = upgrade_note(note["settings"])
        except (AttributeError, KeyError, TypeError) as error:
            problem = f"is not the note of a snapshot ({error!r})"
            raise ArtifactError(path / NOTE, problem, fix) from None
        self._check(note, settings, path)
        derived = found if isinstance(found := note.get(DERIVED), dict) else {}
        self.changes = [*read_changes(note), *self._changed(settings, derived, progress.step)]
        loaded = load_sharded(self._state(is_loading=True), path, fix)
        self.masked_model.model.load_state_dict(
            {key: value for key, value in loaded.items() if key != "optimizer"}, strict=False
        )
        self.learner.load(loaded["optimizer"])
        return progress

    def newest(self) -> int | None:
        """The step of the newest finished snapshot as rank 0 sees it; None where there is none.

        All ranks must call this: on a network file system they may see new folders at other times.
        """
        found = self.mesh.from_main(max(self.steps(), default=-1))
        return None if found < 0 else found

    def steps(self) -> list[int]:
        """Steps of the finished snapshots, ascending."""
        return snapshot_steps(self.folder)

    def _has_started_over(self) -> bool:
        """Whether an earlier start of this launch has put the snapshots of the run before aside."""
        launch, path = os.environ.get(LAUNCH), self.folder / STARTED_OVER
        try:
            found = bool(launch) and storage.read_json(path, "") == {"launch": launch}
        except ArtifactError:  # there is none, mostly
            found = False
        return self.mesh.from_main(found)

    def _start_over(self, has_snapshots: bool) -> None:
        """Put snapshots and masks of the run before aside, if there are any, and note who did."""
        self.mesh.barrier()  # everyone has seen them
        masks = [path for path in self.masks if path.exists()] if self.mesh.is_main else []
        if self.mesh.is_main and (has_snapshots or masks):
            aside = self.put_aside(masks)  # first: they pass for masks of a run without snapshots
            for path in self.folder.iterdir() if has_snapshots else ():
                path.rename(aside / path.name)
            for name in OF_A_RUN:  # how the masks came about
                if (self.folder.parent / name).exists():
                    shutil.move(self.folder.parent / name, aside / name)
            what = "snapshots and masks" if masks else "snapshots"
            log.warning("learn.resume=false: the %s of the run before are in %s now", what, aside)
        if self.mesh.is_main:
            self.folder.mkdir(exist_ok=True)
            storage.write_json(self.folder / STARTED_OVER, {"launch": os.environ.get(LAUNCH)})
        self.mesh.barrier()

    def put_aside(self, masks: Sequence[Path]) -> Path:
        """Move masks, with the times beside them, into a new folder, and return it."""
        names = (
            self.folder.with_name(f"{self.folder.name}-before-{number}")
            for number in itertools.count(1)
        )
        aside = next(path for path in names if not path.exists())
        aside.mkdir(parents=True)
        for path in (each for mask in masks for each in (times_path(mask), mask)):
            if path.exists():
                shutil.move(path, aside / path.name)
        return aside

    def _state(self, is_loading: bool = False) -> dict[str, Any]:
        logits = {
            key: value
            for key, value in sharded_state(self.masked_model.model).items()
            if key.endswith(".mask_logits")
        }
        return {
            **logits,
            "optimizer": self.learner.state(logits, is_loading),
        }

    def _check(self, note: dict[str, Any], there: dict[str, Any], path: Path) -> None:
        """Check that the snapshot is of this model, these settings and this text.

        The notes of version 0.1.0 hold no digests of text, tokenizer and prior: their paths are
        compared in the place of the content. Notes without ``data.bos`` are of text without BOS.
        """
        has_its_linears = note["fingerprint"] == self.masked_model.fingerprint
        if not has_its_linears or not is_model_of(note, self.masked_model.digest):
            what = f": {OTHER_PARTS}" if has_its_linears else ""
            raise ArtifactError(
                path,
                f"was made for another base model{what}",
                "Use another run_dir, or convert the model that it was made for.",
            )
        content = note.get("content")
        known = settings_of_role("content") if content is not None else MODEL_PATHS
        for key, (before, now) in self._differences(there).items():
            if key in known or key in settings_of_role("each step"):
                continue
            fix = "Set it back, use another run_dir, or start over with learn.resume=false."
            allowed = f"the run in {path.parent} was started with {before!r}"
            raise ConfigError(key, now, allowed, fix)
        if self.content is None:
            return
        if "data.bos" not in there:
            self.content.check_without_bos(path, self.config)
        if content is not None:
            self.content.check_same(content, path, self.config)

    def _differences(self, there: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        return learning_changes(there, self.config)

    def _changed(self, there: dict[str, Any], derived: dict[str, Any], step: int) -> list[Changed]:
        """The settings that change with this start, each said in the log: those that were given,
        and those that follow from them.

        Raises:
            ConfigError: a setting differs, and all steps were learned already.
        """
        differing = {
            key: values
            for key, values in self._differences(there).items()
            if key in settings_of_role("each step")
        }
        steps = self.config.learn.steps
        if step >= steps:
            for key, (before, now) in differing.items():
                if key not in (STEPS, WARMUP):  # a warm-up longer than the run is refused
                    allowed = f"all {step} steps were learned with {before!r}"
                    fix = f"Set it back, or raise {STEPS} above {step} to go on with {now!r}."
                    raise ConfigError(key, now, allowed, fix)
            return []
        following = self.method.derived(self.config)
        differing |= {
            key: (derived[key], value)
            for key, value in following.items()
            if derived.get(key, value) != value
        }
        found = [
            Changed(step, utc_now(), key, before, now) for key, (before, now) in differing.items()
        ]
        if self.mesh.is_main:
            for one in found:
                log.warning("changed for this run: %s", one)
            if STEPS in differing and step:
                log.warning(
                    "the learning rate, kappa, tau and the weight-norm term are functions of step "
                    "/ learn.steps: from step %d on they are those of a run of %d steps",
                    step,
                    steps,
                )
        return found
