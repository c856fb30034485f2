"""The tests of this folder run in a Slurm cluster of their own, when they are asked for."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.e2e.conftest import (  # noqa: F401 - fixtures
    corpus,
    model,
    prepared,
    run_dir,
    settings,
)
from tests.slurm.lab import Lab, missing


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave these tests out unless the command line asks for them: -m slurm."""
    if "slurm" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("slurm")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """The cluster, or a skip that says what is missing or why its daemons do not start here. A job
    that fails in a running cluster is a failure.
    """
    if why := missing():
        pytest.skip(f"no Slurm cluster: {why}")
    lab = Lab(Path(os.path.realpath(tmp_path_factory.mktemp("lab"))))
    try:
        lab.__enter__()
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no Slurm cluster: its daemons do not start here: {error}")
    with closing(lab):
        yield lab
