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
from megamask.storage import require_writable, write_json


def run(config: Config) -> None:
    """Compare ``diff.a`` and ``diff.b``; print tables, write ``diff.out`` and ``diff.picture``
    where they are set.

    Raises:
        ConfigError: a mask to compare is not named.
        ArtifactError: masks that are missing, torn, or not of one model.
    """
    section = config.diff
    for key, text in (("diff.a", section.a), ("diff.b", section.b)):
        if text is None:
            fix = "Write megamask diff sparsegpt learned run_dir=runs/mine, or paths of mask files or snapshots."
            raise ConfigError(key, None, "diff compares two masks", fix)
    for key, out in (("diff.out", section.out), ("diff.picture", section.picture)):
        if out is not None:
            require_writable(Path(out).parent, key)
    a, b = open_masks(str(section.a), config), open_masks(str(section.b), config)
    found = differences(a, b)
    print("\n".join(lines(a, b, found)))
    if section.out:
        write_json(Path(section.out), figures(a, b, found))
    if section.picture:
        draw(a, b, found, Path(section.picture))
