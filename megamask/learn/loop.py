"""The verb learn: the driver of a learning run, under plain python or torchrun, at any TP x DP."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict
from pathlib import Path

from megamask.config.paths import LEARNED, LEARNED_BEST
from megamask.data.batches import BatchPlan
from megamask.errors import EXIT_INTERRUPTED, EXIT_OK, LearningError, MegamaskError
from megamask.learn.evaluation import (
    hard_mask_perplexity,
    mean_log_perplexity,
    monitor_windows,
    windows_digest,
)
from megamask.learn.heartbeat import Heartbeat, State
from megamask.learn.learned_mask import (
    WINDOWS,
    evaluation_of,
    learned_from,
    save_learned_mask,
)
from megamask.learn.learner import Learner
from megamask.learn.masked_model import build_masked_model
from megamask.learn.methods import find_method
from megamask.learn.metrics.banner import banner
from megamask.learn.metrics.mask_stats import MaskStatistics
from megamask.learn.metrics.monitor import Monitor
from megamask.learn.metrics.provenance import write_provenance
from megamask.learn.snapshot import Snapshots
from megamask.leftovers import remove_leftovers
from megamask.masks.times import write_seconds
from megamask.parallel.mesh import Mesh
from megamask.prepare.run_inputs import LearnInputs
from megamask.process.holder import Holder, utc_now
from megamask.process.place import this_place
from megamask.process.signals import StopRequest
from megamask.process.watchdog import Watchdog

log = logging.getLogger(__name__)


class Run:
    """A learning run: the inputs that it stands on, and the loop."""

    def __init__(self, inputs: LearnInputs, mesh: Mesh) -> None:
        config, paths = inputs.config, inputs.paths
        learn, method = config.learn, find_method(config.learn.method)
        self.config, self.mesh, self.paths = config, mesh, paths
        # text: to learn from, and held out
        self.windows = monitor_windows(config)
        self.plan = BatchPlan(
            method.samples(config),
            learn.global_batch,
            learn.micro_batch,
            mesh.dp,
            mesh.dp_rank,
            self._expect_progress,
        )
        # model and learner
        self.masked_model = build_masked_model(inputs, mesh)
        self.mask_statistics = MaskStatistics(self.masked_model, mesh, learn.state.track_flips)
        self.learner: Learner = method.build(config, mesh, self.masked_model)
        # the state of an earlier life of this run
        self.snapshots = Snapshots(
            paths.learn / "snapshots",
            config,
            mesh,
            self.masked_model,
            self.learner,
            inputs.content,
            [paths.mask(LEARNED), paths.mask(LEARNED_BEST)],
            self._expect_snapshot,
        )
        self.content = inputs.content
        method_of, found = inputs.prior_method, inputs.prior
        self.prior = (method_of, found.content_sha256) if method_of and found else None
        self.progress = self.snapshots.restore()
        self._recall_best()
        self.first_step = self.progress.step  # the first that this process takes, from 0
        if self.progress.step:
            self.mask_statistics.forget_latest()
        # signs of life and metrics
        if mesh.is_main:
            remove_leftovers(paths.learn, is_alone=True)
            self._put_other_mask_aside()
        self.holder = Holder.this_process("megamask learn")
        self.watchdog = Watchdog(paths.learn / "logs", this_place())
        tokens = learn.global_batch * config.data.seq_length
        self.monitor = Monitor(
            paths.learn, config, learn.steps, tokens, mesh.is_main, self.progress.step
        )
        if mesh.is_main:
            # A start that learns no step leaves what the steps were learned with.
            if self.progress.step < learn.steps or not (paths.learn / "config.yaml").exists():
                write_provenance(paths.learn, config, self.snapshots.changes)
            for line in banner(config, self.masked_model, mesh):
                self.monitor.note(line)

    def learn(self, stop: StopRequest) -> int:
        """Steps, evaluations and snapshots until the last step or a request to stop.

        Returns:
            EXIT_INTERRUPTED after a signal, so that a launcher starts the run again; else EXIT_OK.
        """
        if self.mesh.is_main:
            stop.watch(self.paths.learn)
        with self.watchdog.watching():
            return self._learn(stop)

    def _learn(self, stop: StopRequest) -> int:
        learn, progress = self.config.learn, self.progress
        self._show("starting")
        try:
            if self.mesh.from_main(self._is_done()):
                mask = self.paths.mask(LEARNED)
                self.monitor.note(f"{mask} is there already, learned in {progress.step} steps")
                self._show("finished")
                return EXIT_OK
            if self.mesh.any(bool(stop)):  # it came while the model was loaded
                return self._leave(stop)
            if progress.step == 0:
                self._evaluate()
            while progress.step < learn.steps:
                self._step()
                self.snapshots.background.proceed()
                if self._is_time_to_evaluate():
                    self._evaluate()
                if self.mesh.any(bool(stop)):
                    return self._leave(stop)
                if progress.step % learn.snapshot.every == 0:
                    self.snapshots.begin(progress)
                    self._show("learning")
            self._finish()
            self._show("finished")
            return EXIT_OK
        except LearningError:  # raised on all ranks
            try:
                self.snapshots.settle()
            except MegamaskError as error:  # the failure of learning is told first
                log.warning("%s", error)
            self._show("failed")
            raise
        except BaseException:
            self.snapshots.background.abandon()
            self._show("failed")
            raise
        finally:
            self.monitor.close()

    def _step(self) -> None:
        result = self.learner.step(self.progress.step, self.plan)
        self.progress.step += 1
        moved = asdict(self.mask_statistics(result.first_draw))
        self.monitor.train(self.progress.step, {**result.metrics(), **moved})
        self._show("learning")

    def _show(self, state: State) -> None:
        """Write the heartbeat, and start the time of the watchdog anew."""
        if self.mesh.is_main:
            step, steps = self.progress.step, self.config.learn.steps
            heartbeat = Heartbeat(state, step, steps, utc_now(), self.holder, self.mesh.world)
            heartbeat.write(self.paths.learn)
        self._expect_progress()

    def _expect_progress(self) -> None:
        """Start the time of the watchdog anew.

        A network that the settings of a job do not fit shows in the first step, so the times up to
        its end are short.
        """
        step, parallel = self.progress.step, self.config.parallel
        what, minutes = f"progress after step {step}", parallel.timeout_minutes
        if step == self.first_step:
            what = "progress towards the end of the first step (parallel.first_step_minutes)"
            minutes = min(minutes, parallel.first_step_minutes)
        self._expect(what, minutes)

    def _expect(self, what: str, minutes: float) -> None:
        """Start the time of the watchdog anew. One process waits for nobody, and has no limit."""
        if self.mesh.world > 1:
            self.watchdog.expect(what, 60.0 * minutes)

    def _expect_snapshot(self) -> None:
        """Start the time of the watchdog anew, for one snapshot."""
        self._expect("a snapshot", self.config.parallel.timeout_minutes)

    def _show_learning(self) -> None:
        self._show("learning")

    def _is_time_to_evaluate(self) -> bool:
        every, step = self.config.learn.monitor.evaluate_every, self.progress.step
        return every > 0 and step % every == 0 and step < self.config.learn.steps

    def _evaluate(self) -> dict[str, float]:
        progress, micro_batch = self.progress, self.config.evaluate.micro_batch
        by_domain = hard_mask_perplexity(
            self.masked_model, self.mesh, self.windows, micro_batch, self._show_learning
        )
        score = mean_log_perplexity(by_domain)
        best = progress.best_score
        is_better = math.isfinite(score) and (best is None or score < best)
        if self.mesh.from_main(is_better):
            progress.best_score, progress.best_step = score, progress.step
            if progress.step:
                self._save_mask(LEARNED_BEST, by_domain)
        self.monitor.evaluation(progress.step, by_domain)
        self._show("learning")
        return by_domain

    def _recall_best(self) -> None:
        """Make the best score that of the best mask on disk.

        A best mask of a later step than the snapshot is put aside: other steps follow. Where the
        mask of the best score is gone, or the score was measured on other windows, the next
        evaluation is the best. The evaluation after the last step comes after the snapshot of that
        step, so the mask may be better than the snapshot's note says; then its header has the
        score, if it is of these windows.
        """
        progress, windows = self.progress, windows_digest(self.windows)
        compares = progress.measured_on in ("", windows)
        progress.measured_on = windows
        known = None  # the step of the best mask, and its score
        if self.mesh.is_main:
            path = self.paths.mask(LEARNED_BEST)
            known = evaluation_of(path, windows)
            if known is not None and known[0] > progress.step:
                self._put_aside(path, known[0])
                known = None
        step, by_domain = self.mesh.from_main(known) or (0, {})
        if not compares or (not step and progress.best_step):
            progress.best_score, progress.best_step = None, 0
        elif step not in (0, progress.best_step):
            score = mean_log_perplexity(by_domain) if by_domain else None
            progress.best_score, progress.best_step = score, step

    def _put_other_mask_aside(self) -> None:
        """Put a learned mask aside that is of a later step than the run goes on from: at the end it
        would pass for the mask of this run.
        """
        path, step = self.paths.mask(LEARNED), self.progress.step
        known = evaluation_of(path)
        if known is not None and known[0] > step and step < self.config.learn.steps:
            self._put_aside(path, known[0])

    def _put_aside(self, path: Path, step: int) -> None:
        aside, here = self.snapshots.put_aside([path]), self.progress.step
        text = "%s is of step %d, and the run goes on from step %d: it is in %s now"
        log.warning(text, path, step, here, aside)

    def _is_done(self) -> bool:
        is_last = self.progress.step >= self.config.learn.steps
        known = evaluation_of(self.paths.mask(LEARNED))
        return is_last and known is not None and known[0] == self.progress.step

    def _leave(self, stop: StopRequest) -> int:
        step, who = self.progress.step, stop.received or "another process"
        self.snapshots.settle()
        if step != self.snapshots.newest():
            self.snapshots.save(self.progress)
        self.monitor.note(f"{who}: saved at step {step}; start again to go on")
        self._show("interrupted")
        is_final = self.mesh.any(bool(stop) and stop.is_final)
        stop.done()
        return EXIT_OK if is_final else EXIT_INTERRUPTED

    def _finish(self) -> None:
        by_domain = self._evaluate()
        self._save_mask(LEARNED, by_domain)
        self.snapshots.settle()
        if self.progress.step != self.snapshots.newest():
            self.snapshots.save(self.progress)
        best, mask = self.progress.best_step, self.paths.mask(LEARNED)
        self.monitor.note(f"wrote {mask}; best held-out step {best}")

    def _save_mask(self, name: str, by_domain: dict[str, float]) -> None:
        step, window = self.progress.step, self.config.evaluate.window
        changes = self.snapshots.changes
        data = learned_from(self.config, self.content.text, step, self.prior, changes)
        evaluation = {
            "step": step,
            "window": window,
            WINDOWS: windows_digest(self.windows),
            "perplexity": by_domain,
        }
        path = self.paths.mask(name)
        if self.mesh.is_main:
            write_seconds(path, self.monitor.seconds)
        save_learned_mask(path, self.masked_model, self.mesh, data, evaluation)
