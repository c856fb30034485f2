"""A compiler or a server that does not work is told before the model is loaded, on all ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megamask.errors import EXIT_USER_ERROR
from tests.e2e.program import Finished, assert_untouched, contents
from tests.e2e.ranks import run_program

pytestmark = pytest.mark.slow

Settings = Callable[[Path], list[str]]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a login, a compiler that fails, and no update that was compiled before."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(home / "compiled"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    compiler = home / "g++"
    compiler.write_text("#!/bin/sh\necho cc1plus: no such file >&2; exit 1\n")
    compiler.chmod(0o755)
    return home


def told(ranks: list[Finished]) -> str:
    """The one message of ranks that leave together."""
    assert [one.code for one in ranks] == [EXIT_USER_ERROR] * len(ranks), ranks
    lines = [line for one in ranks for line in one.stderr.splitlines() if "error" in line]
    assert len(lines) == 1 and "Traceback" not in "".join(one.stderr for one in ranks), ranks
    return lines[0]


def test_wandb_without_a_login(home: Path, run_dir: Path, settings: Settings) -> None:
    pytest.importorskip("wandb")
    before = contents(run_dir)
    ranks = run_program("learn", *settings(run_dir), "learn.monitor.sinks=[wandb]")
    message = told(ranks)
    assert "learn.monitor.sinks" in message and "wandb could not log in" in message
    assert message.endswith("Run `wandb login`, or name wandb_offline in learn.monitor.sinks.")
    assert_untouched(run_dir, before)


def break_the_compiler_of_rank_1() -> None:
    if os.environ["RANK"] == "1":
        import torch._inductor.config  # which read CXX at its import, in the fork server

        compiler = f"{os.environ['HOME']}/g++"
        torch._inductor.config.cpp.cxx = (None, compiler)


def test_a_compiler_that_fails_on_one_rank(home: Path, run_dir: Path, settings: Settings) -> None:
    pytest.importorskip("torchao")
    before = contents(run_dir)
    prepare = f"{__name__}:{break_the_compiler_of_rank_1.__name__}"
    words = [*settings(run_dir), "learn.optimizer.kind=adamw8bit"]
    message = told(run_program("learn", *words, prepare=prepare))
    assert "error: rank 1 on " in message
    assert "learn.optimizer.kind = 'adamw8bit'" in message and "a step failed" in message
    assert message.endswith("Mend the compiler, or use lion8bit, which needs none.")
    assert_untouched(run_dir, before)
