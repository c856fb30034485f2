"""The verb diff: how two masks differ, by layer and by kind of linear, as tables, JSON and a
picture.
"""

from __future__ import annotations

from pathlib import Path

from megamask.config import Config
from megamask.errors import ConfigError
from megamask.masks.compare import differences
from megamask.masks.find import open_masks
from megamask.report.difference_tables import draw, figures, lines
from megamask.storage import require_file_place, write_json
from megamask.terminal import tell
from megamask.verbs.own_arguments import DiffArguments


def run(config: Config, arguments: DiffArguments) -> None:
    """Compare two masks; print tables, write figures and a picture where they are asked for.

    Raises:
        ConfigError: a file is to be written where a folder is, or a picture is to be no PNG.
        ArtifactError: masks that are missing, torn, or not of one model.
    """
    for key, out in (("--json", arguments.json), ("--picture", arguments.picture)):
        if out is not None:
            require_file_place(Path(out), key)
    if arguments.picture and Path(arguments.picture).suffix != ".png":
        raise ConfigError("--picture", arguments.picture, "a PNG file", "Name it FILE.png.")
    a, b = open_masks(arguments.a, config), open_masks(arguments.b, config)
    found = differences(a, b)
    tell("\n".join(lines(a, b, found)))
    if arguments.json:
        write_json(Path(arguments.json), figures(a, b, found))
    if arguments.picture:
        draw(a, b, found, Path(arguments.picture))
