"""A folder with a PyTorch file of one tensor, zeros and ones (O, I), for each linear.

MaskPro's ``learned_mask/`` (and ``initial_mask/``) holds ``MODULE.pt`` of bool, ProxSparse's
``proximal_MODEL/`` holds ``MODULE.weight.pt`` in the dtype of the model. Sources: ``wrapper.py`` of
woodenchild95/Maskpro and ``end-to-end/mask_op.py`` of amazon-science/ProxSparse.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from torch import Tensor

from megamask.masks.foreign.kind import FIX, SAFE, Base, Kind, checked_mask
from megamask.masks.shapes_fit import check_shapes
from megamask.weights.torch_bin import read_tensor

PT, WEIGHT_PT = ".pt", ".weight.pt"


def read(ending: str, path: Path, base: Base) -> Iterator[tuple[str, Tensor]]:
    """The masks of a folder.

    Args:
        ending: of the name of each file, after the name of the linear.
        path, base: as ``Kind.read``, whose errors these are.
    """
    files = {file.name.removesuffix(ending): file for file in sorted(path.glob(f"*{PT}"))}
    known = {name: base.shapes.get(name, (0, 0)) for name in files}
    check_shapes(path, known, base.shapes)
    for name, file in files.items():
        yield name, checked_mask(file, name, read_tensor(file, FIX, SAFE), base)


def _fits(of_weights: bool, path: Path) -> bool:
    """Whether a folder without a model holds such files, all (or not all) named after weights."""
    if not path.is_dir() or (path / "config.json").exists():
        return False
    names = [file.name for file in path.glob(f"*{PT}")]
    return bool(names) and all(name.endswith(WEIGHT_PT) for name in names) == of_weights


PROXSPARSE = Kind(
    "proxsparse",
    "ProxSparse's folder of MODULE.weight.pt files",
    partial(_fits, True),
    partial(read, WEIGHT_PT),
)
MASKPRO = Kind(
    "maskpro",
    "MaskPro's folder of MODULE.pt files",
    partial(_fits, False),
    partial(read, PT),
)
