"""One place where a learning run's metrics go, and the line that shows how it is doing.

Fields of a training record: step, tokens, seconds, loss, lm_loss, kd_loss and hidden_loss (of
distillation), weight_norm_term, grad_norm, clip_factor, max_prob, flip_rate, prior_difference, lr,
kappa, tau, signal_share, below_epsilon and relative_step (of some steps), tokens_per_second,
memory_gib, eta_seconds. Of an evaluation record: step, tokens, seconds, perplexity {domain: value}.
"""

from __future__ import annotations

import logging
import math
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megamask.config import Config
from megamask.learn.metrics.sinks import (
    Console,
    Forgiving,
    MetricsFile,
    PackageLog,
    Record,
    Sink,
    open_optional_sinks,
)
from megamask.terminal import duration

_log = logging.getLogger(__name__)
GIB = 2.0**30


class Monitor:
    """Writes ``metrics.jsonl``, ``log.txt``, TensorBoard and wandb files in ``folder``, and a live
    line to the terminal.

    Args:
        folder: the learning run's folder; made if missing.
        config: which of TensorBoard and wandb to write, and the device whose memory is reported.
        total_steps: steps of the whole run, for the ETA.
        tokens_per_step: tokens of one global batch.
        is_main: False makes every method do nothing: no files, no output.
        resume_step: the last step that will not be repeated; what was recorded after it is dropped.
            0 starts over.

    Raises:
        ConfigError: wandb is to be online and cannot be.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        total_steps: int,
        tokens_per_step: int,
        is_main: bool,
        resume_step: int = 0,
    ) -> None:
        self._total_steps, self._tokens_per_step = total_steps, tokens_per_step
        self._is_open = is_main
        if not is_main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._on_cuda = config.device != "cpu" and torch.cuda.is_available()
        self._console = Console()
        self._package_log = PackageLog(folder / "log.txt", self._console)
        try:
            metrics = MetricsFile(folder / "metrics.jsonl", resume_step)
            self._sinks: list[Sink] = [
                Forgiving(metrics, "metrics.jsonl"),
                *open_optional_sinks(folder, config, resume_step),
            ]
        except BaseException:
            self._package_log.close()
            raise
        self._start = time.monotonic() - metrics.seconds
        self._pace = Pace(resume_step)
        begins = "resumed after" if resume_step else "starting at"
        where = f"step {resume_step} of {total_steps}"
        self.note(f"{begins} {where}, {tokens_per_step} tokens a step")

    def train(self, step: int, values: Mapping[str, float | None]) -> None:
        """Record a finished step (counted from 1); a value of None is left out. A value given here
        wins over one measured here.
        """
        if not self._is_open:
            return
        seconds_per_step = self._pace.step_done(step)
        record = {
            **self._stamp("train", step),
            **{name: float(value) for name, value in values.items() if value is not None},
        }
        record.setdefault("tokens_per_second", self._tokens_per_step / seconds_per_step)
        record.setdefault("memory_gib", peak_memory_gib(self._on_cuda))
        record.setdefault("eta_seconds", max(0, self._total_steps - step) * seconds_per_step)
        self._write(record)
        is_due = self._console.is_due() or step == self._total_steps
        line = progress_line(record, self._total_steps)
        self._console.progress(line, is_due)
        if is_due:
            _log.info(line, extra={"file_only": True})

    def evaluation(
        self, step: int, perplexity: Mapping[str, float], extra: Mapping[str, Any] | None = None
    ) -> None:
        """Record the hard mask's held-out perplexity per domain after ``step``, with whatever
        else belongs to it.

        The time since the last step counts as evaluation: tokens/s and ETA leave it out.
        """
        if not self._is_open:
            return
        by_domain = {domain: float(value) for domain, value in perplexity.items()}
        self._write({**self._stamp("evaluation", step), "perplexity": by_domain, **(extra or {})})
        self.note(
            f"step {step}  held-out perplexity  "
            + "  ".join(f"{domain} {value:.2f}" for domain, value in by_domain.items())
        )
        self._pace.restart()

    @property
    def seconds(self) -> float:
        """Seconds the run has taken so far, interruptions left out; 0 on other ranks."""
        return time.monotonic() - self._start if self._is_open else 0.0

    def note(self, text: str) -> None:
        """Say something, in the log and above the live line."""
        if self._is_open:
            _log.info(text)

    def close(self) -> None:
        """Flush and close everything; calling it again does nothing."""
        if not self._is_open:
            return
        self._is_open = False
        for sink in self._sinks:
            sink.close()
        self._console.close()
        self._package_log.close()

    def _stamp(self, kind: str, step: int) -> Record:
        return {
            "kind": kind,
            "step": step,
            "tokens": step * self._tokens_per_step,
            "seconds": time.monotonic() - self._start,
        }

    def _write(self, record: Record) -> None:
        for sink in self._sinks:
            sink.write(record)


class Pace:
    """Seconds a step, as the median of the last ``window`` steps: a compile, a snapshot or a busy
    machine does not bend it for long.
    """

    def __init__(self, step: int, window: int = 20) -> None:
        self._step = step
        self._durations: deque[float] = deque(maxlen=window)
        self.restart()

    def restart(self) -> None:
        """Start timing the next step now."""
        self._mark = time.monotonic()

    def step_done(self, step: int) -> float:
        """Take the time of the steps since the last call; return seconds a step."""
        self._durations.append((time.monotonic() - self._mark) / max(1, step - self._step))
        self._step = step
        self.restart()
        return max(statistics.median(self._durations), 1e-9)


def peak_memory_gib(on_cuda: bool) -> float:
    """Peak memory of this process in GiB: what the CUDA allocator handed out, or the resident set
    on the CPU.
    """
    if on_cuda:
        return torch.cuda.max_memory_allocated() / GIB
    unit = (
        1 if sys.platform == "darwin" else 1024
    )  # ru_maxrss is in bytes on macOS and in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def progress_line(record: Record, total_steps: int) -> str:
    """A training record as one line; metrics the learner did not give are left out."""
    parts = [f"step {record['step']}/{total_steps}"]
    formats = {
        "loss": "loss {:.3f}",
        "lm_loss": "lm {:.3f}",
        "kd_loss": "kd {:.3f}",
        "hidden_loss": "hidden {:.3f}",
        "perplexity": "ppl {:.2f}",
        "max_prob": "max-prob {:.3f}",
        "flip_rate": "flips {:.2%}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "memory_gib": "{:.1f} GiB",
    }
    shown = dict(record)
    if "lm_loss" in record:
        shown["perplexity"] = _exp(record["lm_loss"])
    parts += [text.format(shown[name]) for name, text in formats.items() if name in shown]
    return "  ".join([*parts, f"ETA {duration(record['eta_seconds'])}"])


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
