"""The programs of examples/: one runs from top to bottom, and the pages show what the files say.
Those that need a model run in tests/e2e/test_example_programs.py.
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PAGES = {
    "learn_your_model.py": "learn-your-model.md",
    "many_masks.py": "one-model-many-masks.md",
}


def test_one_step(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "one_step.py"), run_name="__main__")
    told = capsys.readouterr().out
    before, after = map(float, re.findall(r"^loss: (\S+) -> (\S+)$", told, re.M)[0])
    assert after < before
    assert "kept in a group: 2 to 2 of 4" in told
    assert "weight None" in told  # the weight is frozen


@pytest.mark.parametrize("program", PAGES)
def test_a_page_shows_the_program_as_it_is(program: str) -> None:
    page = (ROOT / "docs" / PAGES[program]).read_text()
    assert f"```python\n{(EXAMPLES / program).read_text()}```\n" in page
