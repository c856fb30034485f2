"""MaskLLM's ``mask_compressed.npz``: for each weight an array ``NAME.weight.mask`` of packed bits.

The archive says no shapes; they come from the base model. Source: ``eval_llama_ppl.py`` and
``tool_compress_mask.py`` of NVlabs/MaskLLM.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from megamask.errors import ArtifactError
from megamask.masks.foreign.kind import FIX, Base, Kind
from megamask.masks.foreign.packed_npz import opened
from megamask.masks.shapes_fit import check_shapes

WHAT = "MaskLLM's mask_compressed.npz"
ENDING = ".weight.mask"


def read(path: Path, base: Base) -> Iterator[tuple[str, Tensor]]:
    """The masks of an archive. The arguments and errors are those of ``Kind.read``."""
    with opened(path, WHAT) as archive:
        for name in linears_named(path, archive.names, base):
            yield name, archive.mask(f"{name}{ENDING}", name, base)


def linears_named(path: Path, keys: list[str], base: Base) -> list[str]:
    """The linears of MaskLLM's keys ``NAME.weight.mask``.

    Raises:
        ArtifactError: there is another key, or a mask of no linear of the base model.
    """
    other = [key for key in keys if not key.endswith(ENDING)]
    if other or not keys:
        problem = f"holds {other[0]!r}" if other else "holds no mask"
        raise ArtifactError(path, f"{problem}, and not only masks NAME{ENDING}", FIX)
    names = [key.removesuffix(ENDING) for key in keys]
    known = {name: base.shapes.get(name, (0, 0)) for name in names}
    check_shapes(path, known, base.shapes)
    return names


KIND = Kind("maskllm", WHAT, lambda path: path.suffix == ".npz", read)
