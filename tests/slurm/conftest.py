"""The tests of this folder run in a Slurm cluster of their own, when they are asked for."""

from __future__ import annotations

import os
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
from tests.slurm.lab import Lab, LabError, missing


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave these tests out unless the command line asks for them: -m slurm."""
    if "slurm" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("slurm")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """The cluster, or a skip that says what this machine lacks. A job that fails in a running
    cluster is a failure, and so is a mistake in the code of the lab.
    """
    if why := missing():
        pytest.skip(f"no Slurm cluster: {why}")
    lab = Lab(Path(os.path.realpath(tmp_path_factory.mktemp("lab"))))
    open_lab(lab)
    with closing(lab):
        yield lab


def open_lab(lab: Lab) -> None:
    """Start the cluster, or skip the test with the reason why this machine does not hold it."""
    try:
        lab.__enter__()
    except LabError as error:
        pytest.skip(f"no Slurm cluster: it does not start here: {error}")
