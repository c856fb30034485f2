"""A process without progress writes its stacks and ends; one with progress does neither."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from megamask.errors import EXIT_UNAVAILABLE

HANG = """
import sys, threading
from pathlib import Path
from megamask.process import watchdog
from megamask.process.place import Place
watchdog.GRACE = 0.1
dog = watchdog.Watchdog(Path(sys.argv[1]), Place(3, 4))

def wait_for_the_others():
    threading.Event().wait()

with dog.watching():
    dog.expect("rest", 1000)
    dog.expect("end of step 7", 0.3)
    wait_for_the_others()
"""


def test_a_hanging_process_says_where_and_ends(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANG, str(tmp_path / "logs")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == EXIT_UNAVAILABLE
    (file,) = (tmp_path / "logs").iterdir()
    assert file.name == "stacks-rank-3.txt" and "wait_for_the_others" in file.read_text()
    assert "no end of step 7 within 0.005 minutes" in file.read_text()
    (message,) = done.stderr.splitlines()
    assert message.startswith("megamask: error (rank 3): no end of step 7") and str(file) in message


PROGRESS = """
import sys, time
from pathlib import Path
from megamask.process.place import Place
from megamask.process.watchdog import Watchdog
dog = Watchdog(Path(sys.argv[1]), Place())
with dog.watching():
    for step in range(6):  # more than the limit in all, less than the limit each
        dog.expect(f"step {step}", 0.5)
        time.sleep(0.2)
"""


def test_progress_keeps_it_quiet(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRESS, str(tmp_path)], capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr, list(tmp_path.iterdir())) == (0, b"", [])
