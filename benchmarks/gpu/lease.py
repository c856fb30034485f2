"""Run the parts of a lease within a budget of seconds, and keep what was measured after each part.

``python -m benchmarks.gpu.lease --out DIR --seconds 540 --parts kernels parity sampling``

The folder of results holds three files, however many parts ran: ``summary.md``, ``results.json``
(the figures of all parts) and ``logs.tar.gz`` (their whole output). All three are written again
after every part, so that a lease that is cut short has lost the running part only.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.gpu.lease_parts import BY_NAME, PARTS, Part, Situation
from benchmarks.gpu.machine_facts import clocks
from megamask.user_paths import path_argument

NOT_RUN = "not run"
TAIL = 60  # lines of a part in the summary


@dataclass
class Outcome:
    """What became of a part.

    Attributes:
        part: the part.
        state: ``ok``, ``failed with exit code N``, ``ended after N s``, or ``not run: why``.
        seconds: that it took.
        output: all that it printed.
        figures: of its ``--json`` file.
        clocks: of the card before and after it.
    """

    part: Part
    state: str
    seconds: float = 0.0
    output: str = ""
    figures: Any = None
    clocks: tuple[str, str] = ("", "")

    @property
    def failed(self) -> bool:
        """Whether it was run, and did not end well."""
        return self.state != "ok" and not self.state.startswith(NOT_RUN)


@dataclass
class Lease:
    """The parts that were asked for, and the time that is left for them.

    Attributes:
        situation: device, model and folders.
        out: folder of the results.
        seconds: the budget.
        outcomes: of the parts so far.
    """

    situation: Situation
    out: Path
    seconds: float
    outcomes: list[Outcome] = field(default_factory=list)
    begin: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.seconds - (time.monotonic() - self.begin)

    def run(self, parts: Sequence[Part]) -> int:
        """Run the parts in their order; 1 when one failed."""
        self.keep()
        for part in parts:
            self.outcomes.append(self.run_part(part))
            self.keep()
        return int(any(outcome.failed for outcome in self.outcomes))

    def run_part(self, part: Part) -> Outcome:
        """Run one part, unless what it needs or the time for it is missing."""
        command = part.command(self.situation)
        if command is None:
            return Outcome(part, f"{NOT_RUN}: this machine or this call lacks what it needs")
        if self.left < part.seconds:
            return Outcome(part, f"{NOT_RUN}: {self.left:.0f} s left, it takes {part.seconds}")
        figures = self.situation.work / f"{part.name}.json"
        if part.writes_figures:
            command = [*command, "--json", str(figures)]
        print(f"\n## {part.name} ({self.left:.0f} s left): {part.answers}", flush=True)
        before, begin = self._clocks(), time.monotonic()
        state, output = run_limited(command, min(part.limit, self.left))
        outcome = Outcome(part, state, time.monotonic() - begin, output)
        outcome.clocks = (before, self._clocks())
        with contextlib.suppress(OSError, ValueError):
            outcome.figures = json.loads(figures.read_text())
        print(f"({part.name}: {state}, {outcome.seconds:.0f} s)", flush=True)
        return outcome

    def keep(self) -> None:
        """Write the three files of results anew."""
        self.out.mkdir(parents=True, exist_ok=True)
        write_whole(self.out / "summary.md", self.summary().encode())
        record = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "device": self.situation.device,
            "parts": {
                outcome.part.name: {
                    "state": outcome.state,
                    "seconds": round(outcome.seconds, 1),
                    "clocks": outcome.clocks,
                    "result": outcome.figures,
                }
                for outcome in self.outcomes
            },
        }
        write_whole(self.out / "results.json", json.dumps(record, indent=1).encode())
        write_whole(self.out / "logs.tar.gz", self._logs())

    def summary(self) -> str:
        """The results as Markdown."""
        what = "a GPU" if self.situation.device == "cuda" else "a CPU at toy size"
        lines = [f"# Measured on {datetime.now(timezone.utc):%Y-%m-%d}, on {what}", ""]
        if self.situation.is_toy:
            lines += ["These figures show that the parts run, and nothing else.", ""]
        lines += ["| part | answers | state | seconds | expected |", "|---|---|---|--:|--:|"]
        for outcome in self.outcomes:
            part = outcome.part
            lines.append(
                f"| {part.name} | {part.answers} | {outcome.state} | {outcome.seconds:.0f} "
                f"| {part.seconds} |"
            )
        for outcome in self.outcomes:
            if not outcome.output:
                continue
            printed = outcome.output.splitlines()
            shown = printed[-TAIL:] if outcome.failed else printed
            clocks = " -> ".join(filter(None, outcome.clocks))
            lines += ["", f"## {outcome.part.name}", "", *([clocks, ""] if clocks else [])]
            lines += ["```", *shown, "```"] if outcome.failed else shown
        return "\n".join([*lines, ""])

    def _logs(self) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            for outcome in self.outcomes:
                content = outcome.output.encode()
                entry = tarfile.TarInfo(f"{outcome.part.name}.txt")
                entry.size, entry.mtime = len(content), int(time.time())
                archive.addfile(entry, io.BytesIO(content))
        return buffer.getvalue()

    def _clocks(self) -> str:
        return clocks() if self.situation.device == "cuda" else ""


def run_limited(command: Sequence[str], seconds: float) -> tuple[str, str]:
    """Run a command in a process group of its own, print what it prints, and end the whole group
    after ``seconds``.

    Returns:
        ``ok`` or what went wrong, and the output.
    """
    lines: list[str] = []
    try:
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return f"{NOT_RUN}: {error}", ""
    assert child.stdout is not None
    running.add(child.pid)

    def echo(stream: Any) -> None:
        for line in stream:
            lines.append(line)
            print(line, end="", flush=True)

    reader = threading.Thread(target=echo, args=(child.stdout,), daemon=True)
    reader.start()
    try:
        code = child.wait(seconds)
        state = "ok" if code == 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        state = f"ended after {seconds:.0f} s"
    finally:
        _end_group(child.pid)
        child.wait()
        running.discard(child.pid)
    reader.join(5)
    return state, "".join(lines)


running: set[int] = set()  # process groups of parts


def _end_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name, then rename it: a reader never finds half of it."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that the command line asks for."""
    options = read_options(argv)
    chosen = [BY_NAME[name] for name in options.parts] if options.parts else list(PARTS)
    with tempfile.TemporaryDirectory() as folder:
        situation = Situation(
            options.device,
            Path(folder),
            options.model,
            options.recipe,
            options.steps,
            options.curve,
        )
        lease = Lease(situation, options.out, options.seconds)

        def leave(number: int, _frame: FrameType | None) -> None:
            for leader in list(running):
                _end_group(leader)
            lease.keep()
            raise SystemExit(128 + number)

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, leave)
        code = lease.run(chosen)
    print(f"\nResults: {options.out / 'summary.md'} ({lease.seconds - lease.left:.0f} s)")
    return code


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--out", type=path_argument, required=True, help="folder of the results")
    options.add_argument("--seconds", type=float, default=540, help="budget of all parts")
    options.add_argument(
        "--parts", nargs="*", choices=tuple(BY_NAME), metavar="PART", help=", ".join(BY_NAME)
    )
    options.add_argument("--model", type=path_argument, help="a Hugging Face folder or a GGUF file")
    options.add_argument("--recipe", type=path_argument, default=Situation.recipe)
    options.add_argument("--steps", type=int, default=Situation.steps)
    options.add_argument("--curve", type=path_argument, help="real_model's --json of a CPU")
    return options.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
