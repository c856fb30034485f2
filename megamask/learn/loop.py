"""The verb learn: the driver of a learning run, under plain python or torchrun, at any TP x DP."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megamask.config import Config
from megamask.data.batches import BatchPlan
from megamask.data.blend import blend_weights, train_dataset
from megamask.errors import EXIT_INTERRUPTED, EXIT_OK, MegamaskError
from megamask.learn.evaluation import hard_mask_perplexity, mean_log_perplexity, monitor_windows
from megamask.learn.gumbel import GradientLearner
from megamask.learn.learner import Learner
from megamask.learn.masked_model import build_masked_model
from megamask.learn.maskpro.policy_gradient import MaskPro
from megamask.learn.maskpro.samples import Reused
from megamask.learn.metrics.mask_stats import MaskStatistics
from megamask.learn.metrics.monitor import Monitor
from megamask.learn.metrics.provenance import write_provenance
from megamask.learn.signals import StopRequest
from megamask.learn.snapshot import Snapshots
from megamask.masks.file import load_masks, save_masks
from megamask.model.mask_shards import gather_masks
from megamask.model.spec import has_transformer_engine
from megamask.optim.schedule import learning_rates
from megamask.parallel.cpu import emulates_bf16
from megamask.parallel.mesh import Mesh
from megamask.prepare.run_inputs import LearnInputs

log = logging.getLogger(__name__)
LEARNERS: dict[str, type[GradientLearner] | type[MaskPro]] = {
    "subset": GradientLearner,
    "categorical": GradientLearner,
    "maskpro": MaskPro,
}


def learning_samples(config: Config) -> Any:
    """The samples by number, in the order of learning."""
    learn = config.learn
    count, whole = learn.maskpro.samples, learn.steps * learn.global_batch
    if learn.method != "maskpro":
        return train_dataset(config, whole, config.data.seq_length, config.seed)
    return Reused(
        train_dataset(config, count or whole, config.data.seq_length, config.seed),
        count,
        config.seed,
    )


class Run:
    """A learning run: what it stands on, and the loop."""

    def __init__(self, inputs: LearnInputs, mesh: Mesh) -> None:
        config, paths = inputs.config, inputs.paths
        self.config, self.mesh, self.paths = config, mesh, paths
        learn = config.learn
        self.windows = monitor_windows(config)
        self.plan = BatchPlan(
            learning_samples(config), learn.global_batch, learn.micro_batch, mesh.dp, mesh.dp_rank
        )
        self.masked_model = build_masked_model(inputs, mesh)
        self.mask_statistics = MaskStatistics(self.masked_model, mesh, learn.state.track_flips)
        self.learner: Learner = LEARNERS[learn.method](config, mesh, self.masked_model)
        self.snapshots = Snapshots(
            paths.learn / "snapshots", config, mesh, self.masked_model, self.learner
        )
        self.progress = self.snapshots.restore()
        if self.progress.step:
            self.mask_statistics.forget_latest()
        tokens = learn.global_batch * config.data.seq_length
        self.monitor = Monitor(
            paths.learn, config, learn.steps, tokens, mesh.is_main, self.progress.step
        )
        self._announce()

    def learn(self, stop: StopRequest) -> int:
        """Steps, evaluations and snapshots until the last step or a signal."""
        learn, progress = self.config.learn, self.progress
        try:
            if self.mesh.any(self.mesh.is_main and self._is_done()):
                self.monitor.note(
                    f"{self.paths.mask('learned')} is there already, learned in {progress.step} steps"
                )
                return EXIT_OK
            if progress.step == 0:
                self._evaluate()
            while progress.step < learn.steps:
                self._step()
                if (
                    learn.monitor.evaluate_every
                    and progress.step % learn.monitor.evaluate_every == 0
                    and progress.step < learn.steps
                ):
                    self._evaluate()
                if self.mesh.any(bool(stop)):
                    return self._leave(stop)
                if progress.step % learn.snapshot.every == 0:
                    self.snapshots.save(progress)
            self._finish()
            return EXIT_OK
        finally:
            self.monitor.close()

    def _step(self) -> None:
        result = self.learner.step(self.progress.step, self.plan)
        self.progress.step += 1
        moved = asdict(self.mask_statistics(result.first_draw))
        self.monitor.train(self.progress.step, {**result.metrics(), **moved})

    def _evaluate(self) -> dict[str, float]:
        progress, micro_batch = self.progress, self.config.evaluate.micro_batch
        by_domain = hard_mask_perplexity(self.masked_model, self.mesh, self.windows, micro_batch)
        score = mean_log_perplexity(by_domain)
        if progress.best_score is None or score < progress.best_score:
            progress.best_score, progress.best_step = score, progress.step
            if progress.step:
                self._save_mask(self.paths.mask("learned-best"), by_domain)
        self.monitor.evaluation(progress.step, by_domain)
        return by_domain

    def _is_done(self) -> bool:
        if self.progress.step < self.config.learn.steps:
            return False
        try:
            return bool(
                load_masks(self.paths.mask("learned")).meta["evaluation"]["step"]
                == self.progress.step
            )
        except MegamaskError:
            return False

    def _leave(self, stop: StopRequest) -> int:
        self.snapshots.save(self.progress)
        self.monitor.note(
            f"{stop.received or 'another process'}: saved at step {self.progress.step}; start again to go on"
        )
        return EXIT_INTERRUPTED

    def _finish(self) -> None:
        by_domain = self._evaluate()
        self._save_mask(self.paths.mask("learned"), by_domain)
        if self.progress.step not in self.snapshots.steps():
            self.snapshots.save(self.progress)
        self.monitor.note(
            f"wrote {self.paths.mask('learned')}; best held-out step {self.progress.best_step}"
        )

    def _save_mask(self, path: Path, by_domain: dict[str, float]) -> None:
        local = {name: linear.hard_mask() for name, linear in self.masked_model.linears.items()}
        masks = gather_masks(local, self.masked_model.arch, self.mesh)
        if self.mesh.is_main:
            save_masks(
                path,
                masks,
                self.masked_model.pattern,
                fingerprint=self.masked_model.fingerprint,
                method="learned",
                data=self._mask_data(),
                evaluation={
                    "step": self.progress.step,
                    "window": self.config.evaluate.window,
                    "perplexity": by_domain,
                },
            )
        self.mesh.barrier()

    def _mask_data(self) -> dict[str, object]:
        tokens = self.progress.step * self.config.learn.global_batch * self.config.data.seq_length
        learnt = {
            "tokens": tokens,
            "seconds": round(self.monitor.seconds, 1),
            "prior": self.masked_model.prior_method,
        }
        learnt["method"] = self.config.learn.method
        return {
            "blend": blend_weights(self.config),
            "seq_length": self.config.data.seq_length,
            **learnt,
        }

    def _announce(self) -> None:
        masked_model, mesh = self.masked_model, self.mesh
        if not mesh.is_main:
            return
        write_provenance(self.paths.learn, self.config)
        backend = next(iter(masked_model.linears.values())).backend
        weights = (
            sum(linear.weight.numel() for linear in masked_model.linears.values()) * mesh.tp / 1e6
        )
        engine = "Transformer Engine" if has_transformer_engine(mesh.device) else "PyTorch"
        self.monitor.note(
            f"{masked_model.pattern} masks for {len(masked_model.linears)} linears, {weights:.0f} M weights; prior {masked_model.prior_method}; "
            f"{mesh.device}, TP {mesh.tp} x DP {mesh.dp}; sampling by {backend}, norm and attention by {engine}"
        )
        if self.config.learn.method != "maskpro":
            self.monitor.note(
                "learning rate {:.2g}, falling to {:.2g}".format(*learning_rates(self.config.learn))
            )
        if self.config.dtype == "bf16" and mesh.device.type == "cpu" and emulates_bf16():
            self.monitor.note("bf16 is emulated on this CPU: dtype=fp32 is faster")
