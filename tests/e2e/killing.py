"""A verb that kills itself at a chosen moment: before the k-th time that it touches a file."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

CHANGES = (
    "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate",
    "shutil.rmtree", "shutil.copyfile", "shutil.move",
)  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def run(words: list[str], folder: str, moment: int, log: str) -> int:
    """Run the command line ``words``; the process group is killed at the ``moment``-th event.

    Args:
        words: of megamask, or of its pipeline where the first word is ``pipeline``.
        folder: what lies below this folder is watched.
        moment: number of the event, from 1; 0 lets the verb end.
        log: file for the names of the events of a verb that ended, as JSON.
    """
    from megamask import pipeline
    from megamask.__main__ import main

    events: list[str] = []

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event not in CHANGES and event != "open":
            return
        paths = [os.fsdecode(one) for one in args if isinstance(one, str | bytes | os.PathLike)]
        if not any(path.startswith(folder) for path in paths):
            return
        if event == "open" and not (args[2] & WRITING or paths[0].endswith(".tmp")):
            return
        events.append(event)
        if len(events) == moment:
            os.killpg(os.getpgid(0), signal.SIGKILL)

    sys.addaudithook(watch)
    if words[0] == "pipeline":
        sys.argv = words
        code = pipeline.main()
    else:
        code = main(words)
    ended = list(events)
    Path(log).write_text(json.dumps(ended))
    return code


def run_limited(words: list[str], limit: int) -> int:
    """Run the command line ``words`` where no file may have more than ``limit`` bytes, as on a disk
    that becomes full. What it says is written at the end, without a limit.
    """
    import io
    import resource
    from contextlib import redirect_stderr, redirect_stdout

    from megamask.__main__ import main

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        code = main(words)
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
    print(said.getvalue())
    return code
