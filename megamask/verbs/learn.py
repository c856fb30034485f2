"""The verb learn: learn the masks of the frozen model; resumes from the last snapshot."""

from __future__ import annotations

from megamask.config import Config, run_paths
from megamask.learn.loop import Run
from megamask.learn.preflight import check_early
from megamask.learn.signals import stop_on_signal
from megamask.parallel.mesh import start


def run(config: Config) -> int:
    """Learn masks and write them to ``run_paths(config).mask("learned")``; resumes by default.

    Returns:
        EXIT_OK, or EXIT_INTERRUPTED when a signal asked to save and leave.

    Raises:
        MegamaskError: anything the user can mend, before the first step where possible.
    """
    paths = run_paths(config)
    check_early(config, paths)
    with start(config) as mesh, stop_on_signal() as stop:
        return Run(config, mesh, paths).learn(stop)
