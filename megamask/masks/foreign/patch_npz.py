"""PATCH's ``mask.npz``: for each weight an array ``NAME.weight`` of packed bits and an array
``NAME.weight.__shape__`` of two int64, and beside them ``__meta__``, a JSON text.

PATCH keeps whole tiles dense beside tiles of 2:4. A linear that is dense as a whole has no mask,
and a linear of both kinds of tiles is refused: it has no one N:M pattern. Source:
``load_patch_mask.py`` of Paramathic/patch and the masks of its authors on the Hub.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from megamask.errors import ArtifactError
from megamask.masks.foreign.kind import FIX, Base, Kind
from megamask.masks.foreign.packed_npz import names_of_arrays, opened
from megamask.masks.shapes_fit import check_shapes

WHAT = "PATCH's mask.npz"
META, SHAPE, WEIGHT = "__meta__", ".__shape__", ".weight"


def fits(path: Path) -> bool:
    """Whether an archive holds what only PATCH writes."""
    return path.suffix == ".npz" and any(
        name == META or name.endswith(SHAPE) for name in names_of_arrays(path)
    )


def read(path: Path, base: Base) -> Iterator[tuple[str, Tensor]]:
    """The masks of an archive. The arguments and errors are those of ``Kind.read``."""
    with opened(path, WHAT) as archive:
        keys = [name for name in archive.names if name != META and not name.endswith(SHAPE)]
        names = [key.removesuffix(WEIGHT) for key in keys]
        wanted = {*keys, *(f"{key}{SHAPE}" for key in keys)}
        odd = sorted(wanted.symmetric_difference({*archive.names} - {META}))
        odd += [key for key in keys if not key.endswith(WEIGHT)]
        if odd or not keys:
            problem = f"lacks or adds {odd[0]!r}" if odd else "holds no mask"
            raise ArtifactError(path, f"{problem}: each NAME{WEIGHT} needs its {SHAPE}", FIX)
        shapes = {
            name: tuple(
                archive.numbers(f"{key}{SHAPE}", f"a shape of {name}", "i8 i4", (2,)).tolist()
            )
            for name, key in zip(names, keys, strict=True)
        }
        check_shapes(path, shapes, {name: base.shape_in_files(name) for name in base.shapes})
        for name in names:
            mask_OI = archive.mask(f"{name}{WEIGHT}", name, base)
            if bool(mask_OI.all()):
                continue
            _check_tiles(path, name, mask_OI, base)
            yield name, mask_OI


def _check_tiles(path: Path, name: str, mask_OI: Tensor, base: Base) -> None:
    """Refuse a mask of dense groups beside groups of the pattern.

    Raises:
        ArtifactError: the mask mixes them.
    """
    pattern = base.plan[name]
    if mask_OI.shape[1] % pattern.m:
        return
    kept_OG = mask_OI.unflatten(1, (-1, pattern.m)).sum(-1)
    dense = kept_OG == pattern.m
    if bool(dense.any()) and bool((dense | (kept_OG == pattern.n)).all()):
        share = float(dense.float().mean())
        problem = f"keeps {share:.1%} of the groups of {name} dense beside groups of {pattern}"
        fix = "A mask file holds masks of one pattern: import a mask without dense tiles."
        raise ArtifactError(path, problem, fix)


KIND = Kind("patch", WHAT, fits, read)
