"""The type of options that are paths: a home folder, a name that begins with ~, no home."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from megamask.user_paths import path_argument


def test_an_option_takes_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert path_argument("~/runs") == Path("/somewhere/runs")
    assert path_argument("./~/runs") == Path("~/runs")  # a folder of this name


def test_an_unknown_user_is_named_with_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--base", type=path_argument)
    with pytest.raises(SystemExit):
        options.parse_args(["--base", "~nobody-of-this-name/runs"])
    said = capsys.readouterr().err
    assert "argument --base: '~nobody-of-this-name/runs' is not a path in which ~" in said
    assert "Write the home folder itself" in said
