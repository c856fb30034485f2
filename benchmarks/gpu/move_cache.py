"""Make a folder of Triton's cache usable in another place: ``move_cache.py FOLDER``.

Triton finds an entry by its content. The list of the entry's files, ``__grp__*.json``, holds
absolute paths, and Triton takes an entry whose files lie elsewhere for empty. So the lists must be
written anew after a folder was copied.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Write the lists anew, and say how many."""
    print(f"{move_cache(Path(arguments[0]))} compiled kernels in {arguments[0]}")
    return 0


def move_cache(folder: Path) -> int:
    """Let every list of files in ``folder`` name the files that lie beside it.

    Files that did not travel leave their list: a launch needs the metadata and the cubin alone.

    Returns:
        The number of kernels that can be launched from here.
    """
    usable = 0
    for path in folder.resolve().glob("*/__grp__*.json"):
        names = json.loads(path.read_text())["child_paths"]
        here = {name: str(path.with_name(name)) for name in names if path.with_name(name).is_file()}
        path.write_text(json.dumps({"child_paths": here}))
        usable += {".json", ".cubin"} <= {Path(name).suffix for name in here}
    return usable


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
