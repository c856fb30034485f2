"""The verb speed: times of dense and 2:4 products on this GPU, and the rate of generation with
both.
"""

from __future__ import annotations

import logging
from pathlib import Path

from megamask import storage
from megamask.config import Config, run_paths
from megamask.errors import ConfigError
from megamask.parallel.mesh import choose_device
from megamask.runtime.device_facts import lacking
from megamask.runtime.measure_speed import CudaDevice
from megamask.runtime.speed_run import check_positions, measure, passes_of
from megamask.runtime.speed_subject import subject_of_folder, subject_of_shape
from megamask.runtime.speed_table import FILE
from megamask.terminal import tell
from megamask.verbs.own_arguments import SpeedArguments

log = logging.getLogger(__name__)


def run(config: Config, arguments: SpeedArguments) -> None:
    """Measure, write ``speed.json``, ``speed.md`` and ``speed.png`` to the run folder, and print
    the table. The JSON file is written after each shape, and a run that was killed goes on.

    Raises:
        ConfigError: this machine has no GPU with 2:4 kernels, or the settings cannot work.
        ArtifactError: the folder has no 2:4 linear, or none that a kernel takes. Both are found
            before anything is measured.
    """
    missing = lacking() if config.device != "cpu" else "2:4 kernels run on CUDA devices alone"
    if missing:
        fix = "Run the verb on a machine with such a GPU: times of another device say nothing."
        raise ConfigError("device", config.device, missing, fix)
    section, paths = config.speed, run_paths(config)
    passes_of(section)
    keys = config.model.ignore_keys
    if arguments.model is not None:
        subject = subject_of_shape(arguments.model, section.dtype, keys)
    else:
        folder = Path(section.folder) if section.folder else paths.export
        subject = subject_of_folder(folder, section.dtype, keys)
    check_positions(section, subject)
    storage.require_writable(paths.run_dir)
    measure(section, subject, CudaDevice(choose_device(config.device)), paths.run_dir)
    write_shown(paths.run_dir)


def write_shown(folder: Path) -> None:
    """Write the table and the picture of a ``speed.json``, and print the table."""
    from megamask.report import plot_style
    from megamask.report.speed_results import read_speed, speed_markdown

    results = read_speed(folder / FILE)
    text = speed_markdown(results)
    storage.write_text(folder / "speed.md", f"{text}\n")
    for picture in results.pictures:
        plot_style.save(picture.draw, folder / f"{picture.name}.png")
    log.info("wrote %s", folder / FILE)
    tell(text)
