"""The licence of a model goes where its weights go."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from megamask.weights.side_files import belongs

_NAME = re.compile(
    r"licen[cs]e|notice|copying|(^|[-_. ])(terms|eula|use[-_ ]policy)", re.IGNORECASE
)
# In a folder that is no folder of a model, such as that of downloads.
_WHOLE_NAME = re.compile(r"licen[cs]e|notice|copying|use[-_ ]policy", re.IGNORECASE)
_TEXTS = re.compile(r"|\.(txt|md|rst|html|pdf|\d+)", re.IGNORECASE)
LIMIT = 2**20  # bytes; larger files are no licences


def is_licence(name: str, only_whole: bool = False) -> bool:
    """Whether a file of that name states a licence, its terms or its notices.

    Args:
        name: of the file.
        only_whole: whether the name has to be such a word, and not only to hold it.
    """
    stem, suffix = Path(name).stem, Path(name).suffix
    found = _WHOLE_NAME.fullmatch(stem) if only_whole else _NAME.search(stem)
    return found is not None and _TEXTS.fullmatch(suffix) is not None


def copy_licences(source: Path, target: Path, is_of_model: bool = True) -> list[str]:
    """Copy the licence files of folder ``source`` into folder ``target``; returns their names. A
    folder that does not exist has none. Links to places outside the folder are left out: what is
    copied may be published.

    Args:
        source: the folder.
        target: where they go.
        is_of_model: whether the folder is that of the model alone. Beside a file of weights may lie
            what is nobody's business: there names like LICENSE.txt alone are licences.
    """
    found = [
        path
        for path in (sorted(source.iterdir()) if source.is_dir() else [])
        if is_licence(path.name, not is_of_model)
        and belongs(path, source)
        and path.stat().st_size <= LIMIT
    ]
    for path in found:
        shutil.copyfile(path, target / path.name)
    return [path.name for path in found]
