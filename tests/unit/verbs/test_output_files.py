"""A file that cannot be written is told before anything is computed or printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamask.__main__ import main
from megamask.errors import EXIT_USER_ERROR


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["diff", "a", "b"], "--json"),
        (["diff", "a", "b"], "--picture"),
        (["plan", "--model", "smollm2-135m"], "--json"),
        (["plan", "--model", "smollm2-135m", "--search", "2"], "--json"),
    ],
)
def test_a_folder_is_no_file(
    words: list[str], flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for place, said in (
        (tmp_path, "a file, and this is a folder"),
        (tmp_path / "file/x", "written"),
    ):
        assert main([*words, flag, str(place), f"run_dir={tmp_path / 'run'}"]) == EXIT_USER_ERROR
        out, error = capsys.readouterr()
        assert not out and len(error.splitlines()) == 1 and said in error and flag in error, error
