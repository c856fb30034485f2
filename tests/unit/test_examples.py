"""The programs of examples/: one runs as a newcomer runs it, and the pages show what the files say.
Those that need a model run in tests/e2e/test_example_programs.py.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PAGES = {
    "learn_your_model.py": "learn-your-model.md",
    "many_masks.py": "one-model-many-masks.md",
}


def test_one_step() -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "one_step.py"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    before, after = map(float, re.findall(r"^loss: (\S+) -> (\S+)$", done.stdout, re.M)[0])
    assert after < before
    assert "kept in a group: 2 to 2 of 4" in done.stdout
    assert "weight None" in done.stdout  # the weight is frozen


@pytest.mark.parametrize("program", PAGES)
def test_a_page_shows_the_program_as_it_is(program: str) -> None:
    page = (ROOT / "docs" / PAGES[program]).read_text()
    assert f"```python\n{(EXAMPLES / program).read_text()}```\n" in page
