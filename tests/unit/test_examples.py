"""The programs of examples/ run as a newcomer runs them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_one_step() -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "one_step.py"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    before, after = map(float, re.findall(r"^loss: (\S+) -> (\S+)$", done.stdout, re.M)[0])
    assert after < before
    assert "kept in a group: 2 to 2 of 4" in done.stdout
    assert "weight None" in done.stdout  # the weight is frozen
