"""The places a learning run's metrics go to: a JSON-lines file, TensorBoard, wandb, the terminal
and a text log.

A record is one flat dictionary; its ``kind`` is ``train`` or ``evaluation``.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TextIO

from megamask.config import Config
from megamask.errors import ConfigError
from megamask.file_kinds import read_text
from megamask.storage import finite, write_text
from megamask.terminal import PlainFormatter

Record = dict[str, Any]
_log = logging.getLogger(__name__)
_BOOKKEEPING = {"kind", "step", "tokens", "seconds"}


class Sink(Protocol):
    """Somewhere that records go."""

    def write(self, record: Record) -> None:
        """Take one record."""

    def close(self) -> None:
        """Flush and let go."""


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, flushed line by line, so that a killed process
    loses at most the line it was writing.

    A step has one record of a kind: the last evaluation, which a resumed run does again, is not
    written again.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = trim_metrics(path, resume_step)
        seconds = kept[-1].get("seconds") if kept else None
        self.seconds = float(seconds) if isinstance(seconds, int | float) else 0.0
        self._known = {(str(record.get("kind")), record.get("step")) for record in kept}
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append a line; numbers that are not finite become null, because JSON has no word for
        them.
        """
        if (key := (record["kind"], record["step"])) in self._known:
            return
        self._known.add(key)
        self._file.write(json.dumps(finite(record), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Forgiving:
    """A sink whose errors do not end the run: the log tells the first one.

    A full disk loses metrics, and the snapshot that comes next tells of the disk.
    """

    def __init__(self, sink: Sink, name: str) -> None:
        self._sink, self._name, self._told = sink, name, False

    def write(self, record: Record) -> None:
        """Hand the record on."""
        try:
            self._sink.write(record)
        except Exception as error:
            self._tell(error)

    def close(self) -> None:
        """Close the sink."""
        try:
            self._sink.close()
        except Exception as error:
            self._tell(error)

    def _tell(self, error: Exception) -> None:
        if not self._told:
            self._told = True
            _log.warning("%s: metrics are lost (%s)", self._name, error)


def trim_metrics(path: Path, resume_step: int) -> list[Record]:
    """Cut ``path`` back to the steps a resumed run will not repeat, and return the records kept.

    Lines later than ``resume_step`` and torn lines go; with ``resume_step`` 0 the run starts over
    and all lines go. The file is replaced atomically, so that dying here loses nothing.

    Raises:
        ArtifactError: it cannot be read or written, or is a FIFO or the like.
    """
    if not path.exists():
        return []
    kept = []
    lines = read_text(path, "Delete it, and start again.").splitlines()
    for line in lines if resume_step > 0 else ():
        try:
            record = json.loads(line)
            if record.get("step", 0) <= resume_step:
                kept.append(record)
        except (ValueError, TypeError, AttributeError, RecursionError):
            continue  # the line that a killed process was writing
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


class TensorBoard:
    """Event files in ``folder``; on resume TensorBoard itself drops the events that will be written
    again (``purge_step``).
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else 0)

    def write(self, record: Record) -> None:
        """Add one scalar per metric at the record's step, and flush: what a kill loses here would
        not come back on resume.
        """
        for tag, value in scalars(record).items():
            self._writer.add_scalar(tag, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class Wandb:
    """A wandb run whose x-axis is the step of the record. A resumed run keeps its identity, so that
    syncing appends to it.

    Raises:
        ConfigError: wandb cannot start (online without a login or a network).
    """

    def __init__(self, folder: Path, config: Config, resume_step: int) -> None:
        import wandb

        is_online = "wandb" in config.learn.monitor.sinks
        identity = folder / "wandb_id.txt"
        if resume_step == 0 or not identity.exists():
            write_text(identity, uuid.uuid4().hex[:8])
        try:
            self._run = wandb.init(
                project=config.learn.monitor.wandb_project,
                dir=str(folder),
                mode="online" if is_online else "offline",
                id=identity.read_text().strip(),
                resume="allow" if is_online else None,
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            if not is_online:
                raise
            raise _not_online(config, f"could not start ({error})") from error
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        """Log the metrics and the step and tokens they belong to."""
        self._run.log({"step": record["step"], "tokens": record["tokens"], **scalars(record)})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def scalars(record: Record) -> dict[str, float]:
    """The metrics of a record by the name they have in TensorBoard and wandb: ``train/loss``,
    ``perplexity/english``.
    """
    named = {
        f"perplexity/{domain}": value for domain, value in record.get("perplexity", {}).items()
    }
    for key, value in record.items():
        if key not in _BOOKKEEPING and isinstance(value, int | float):
            named[f"{record['kind']}/{key}"] = value
    return {tag: float(value) for tag, value in named.items() if value is not None}


def require_login(config: Config) -> None:
    """Refuse wandb online where it cannot log in. A terminal is asked for a key, as by wandb.init,
    and the key is shown to the server. For one process of a run, before it loads the model.

    Raises:
        ConfigError: there is no key, the server refuses it, or does not answer.
    """
    if "wandb" not in config.learn.monitor.sinks:
        return
    try:
        import wandb
    except Exception:  # missing or broken: said where the sinks are opened
        return
    if not hasattr(wandb, "login"):  # a folder of that name, such as its own output
        return
    try:
        wandb.login(verify=True)
    except Exception as error:  # its own, or those of the library that it asks the server by
        raise _not_online(config, f"could not log in ({error})") from error


def _not_online(config: Config, why: str) -> ConfigError:
    fix = "Run `wandb login`, or name wandb_offline in learn.monitor.sinks."
    return ConfigError("learn.monitor.sinks", config.learn.monitor.sinks, f"wandb {why}", fix)


def open_optional_sinks(folder: Path, config: Config, resume_step: int) -> list[Sink]:
    """TensorBoard and wandb as configured. A package that is not installed, or that cannot start
    here, is said in the log and is no error: nothing that was learned depends on it.

    Raises:
        ConfigError: wandb cannot start online, where the user expects to see the run.
    """
    sinks: list[Sink] = []
    chosen = config.learn.monitor.sinks
    openers: dict[str, Callable[[], Sink]] = {}
    if "tensorboard" in chosen:
        openers["tensorboard"] = lambda: TensorBoard(folder / "tensorboard", resume_step)
    if "wandb" in chosen or "wandb_offline" in chosen:
        openers["wandb"] = lambda: Wandb(folder, config, resume_step)
    for name, opened in openers.items():
        try:
            sinks.append(Forgiving(opened(), name))
        except ImportError:
            _log.info(
                "%s is not installed, so nothing is written for it (pip install %s)", name, name
            )
        except ConfigError:
            raise
        except Exception as error:  # whatever the package raises when it is imported or started
            _log.warning("nothing is written for %s, which cannot start: %s", name, error)
    return sinks


class Console:
    """Messages, and below them one live line: rewritten in place on a terminal, printed at most
    every ``interval`` seconds elsewhere.
    """

    def __init__(self, stream: TextIO | None = None, interval: float = 10.0) -> None:
        self._stream = stream or sys.stderr
        self._interval = interval
        self._in_place = self._stream.isatty()
        self._line = ""
        self._next_print = -math.inf

    def is_due(self) -> bool:
        """Whether ``interval`` has passed since this last said yes."""
        due = time.monotonic() >= self._next_print
        if due:
            self._next_print = time.monotonic() + self._interval
        return due

    def progress(self, line: str, is_due: bool) -> None:
        """Show ``line`` as the live line."""
        if self._in_place:
            self._line = line[: shutil.get_terminal_size().columns - 1]
            self._stream.write(f"\r\033[K{self._line}")
        elif is_due:
            self._stream.write(line + "\n")
        self._stream.flush()

    def message(self, text: str) -> None:
        """Print ``text`` above the live line."""
        self._stream.write(f"\r\033[K{text}\n{self._line}" if self._in_place else text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Leave the last live line standing."""
        if self._line:
            self._stream.write("\n")
            self._stream.flush()
            self._line = ""


class PackageLog:
    """While open, everything the package logs goes to ``log.txt`` and above the live line; whatever
    handlers it had come back on close.
    """

    def __init__(self, path: Path, console: Console) -> None:
        self._logger = logging.getLogger("megamask")
        self._before = (self._logger.handlers, self._logger.propagate, self._logger.level)
        file = _LogFile(path, console)
        file.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(message)s"))
        screen = _ConsoleHandler(console)
        screen.setFormatter(PlainFormatter())
        self._logger.handlers = [file, screen]
        self._logger.propagate = False
        self._logger.setLevel(logging.INFO)

    def close(self) -> None:
        """Close the file and give the package's logger its former handlers back."""
        for handler in self._logger.handlers:
            handler.close()
        self._logger.handlers, self._logger.propagate = self._before[:2]
        self._logger.setLevel(self._before[2])


class _LogFile(logging.FileHandler):
    """``log.txt``. Lines that cannot be written are lost, and the terminal tells it once."""

    def __init__(self, path: Path, console: Console) -> None:
        super().__init__(path, encoding="utf-8")
        self._console, self._told = console, False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not self._told:
            self._told = True
            self._console.message(f"{self.baseFilename}: lines are lost ({error})")

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class _ConsoleHandler(logging.Handler):
    """Messages to the console, but for those marked ``file_only``."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "file_only", False):
            self._console.message(self.format(record))
