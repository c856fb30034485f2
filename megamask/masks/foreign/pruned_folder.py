"""A Hugging Face folder of a pruned model: the mask of a linear keeps the weights other than zero.

A weight that is zero in the base model too may be kept or pruned. Where a group has fewer than N
weights other than zero, it keeps the zeros of the base model, if there are just enough of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megamask.errors import ArtifactError
from megamask.masks.foreign.kind import Base, Kind
from megamask.masks.shapes_fit import check_shapes
from megamask.sparsity.pattern import Pattern
from megamask.weights.architecture import read_architecture
from megamask.weights.hf_files import HFReader, open_checked
from megamask.weights.mapping import expected_tensors, linear_shapes

UPDATED = (
    "A mask belongs to frozen weights: use the pruned model itself, or name the base model that it "
    "was pruned from."
)


def read(path: Path, base: Base) -> Iterator[tuple[str, Tensor]]:
    """The masks of a folder; a linear that equals the base model's has none. The arguments and
    errors are those of ``Kind.read``.
    """
    shapes = linear_shapes(read_architecture(path, base.ignore_keys))
    check_shapes(path, shapes, base.shapes, "base model")
    with open_checked(path, base.ignore_keys) as reader:
        yield from masks_of(reader, base, lambda name: None)


def masks_of(
    reader: HFReader, base: Base, told: Callable[[str], Tensor | None]
) -> Iterator[tuple[str, Tensor]]:
    """The masks of a pruned model whose tensors have the names and shapes of the base model's.

    Args:
        reader: the pruned model.
        base: the base model.
        told: the mask (O, I) of a linear, where the files say the mask beside the weights.

    Raises:
        ArtifactError: weights were updated, or the zeros are not those of one mask of the pattern.
    """
    for name in base.shapes:
        pruned_OI = reader.tensor(f"{name}.weight")
        base_OI = base.weights.tensor(f"{name}.weight").to(pruned_OI.dtype)
        mask_OI = told(name)
        if mask_OI is not None or not torch.equal(pruned_OI, base_OI):
            kept_OI = pruned_OI != 0 if mask_OI is None else mask_OI
            _check_kept(reader.folder, name, kept_OI & (pruned_OI != base_OI), base_OI.dtype)
            if mask_OI is None:
                mask_OI = _with_zeros(reader.folder, name, kept_OI, base_OI, base.plan[name])
            yield name, mask_OI
    linears = {f"{name}.weight" for name in base.shapes}
    others = filter(base.layout.is_other, base.weights.names())
    for name in {*expected_tensors(base.arch), *others} - linears:
        tensor = reader.tensor(name)
        if not torch.equal(tensor, base.weights.tensor(name).to(tensor.dtype)):
            problem = f"has another {name} than the base model: the weights were updated"
            raise ArtifactError(reader.folder, problem, UPDATED)


def _check_kept(path: Path, name: str, changed_OI: Tensor, dtype: torch.dtype) -> None:
    """Check that no kept weight changed.

    Raises:
        ArtifactError: weights were updated.
    """
    if changed := int(changed_OI.sum()):
        problem = (
            f"has {changed:,} weights of {name} that are neither zero nor the base model's "
            f"in {str(dtype).removeprefix('torch.')}: the weights were updated"
        )
        raise ArtifactError(path, problem, UPDATED)


def _with_zeros(
    path: Path, name: str, mask_OI: Tensor, base_OI: Tensor, pattern: Pattern
) -> Tensor:
    """The mask of a linear, from the places of the weights other than zero.

    Raises:
        ArtifactError: the zeros are not those of one mask of the pattern.
    """
    if mask_OI.shape[1] % pattern.m:
        return mask_OI
    n, m = pattern.units.n, pattern.units.m
    kept_OU = pattern.sum_of_units(mask_OI)  # a unit that holds any weight is kept
    kept_OG = kept_OU.unflatten(1, (-1, m)).sum(-1)
    too_few_OU = (kept_OG < n).repeat_interleave(m, 1)
    kept_OU = kept_OU | (too_few_OU & ~pattern.sum_of_units(base_OI != 0))
    mask_OI = mask_OI | (pattern.expand(kept_OU) & (base_OI == 0))
    ambiguous = (kept_OG < n) & (kept_OU.unflatten(1, (-1, m)).sum(-1) > n)
    if bool(ambiguous.any()):
        row, group = ambiguous.nonzero()[0].tolist()
        problem = (
            f"does not say the mask of {int(ambiguous.sum()):,} groups of {name} (the first is row "
            f"{row}, group {group}): the base model has more zeros there than {pattern} prunes"
        )
        fix = "Import the mask itself from the tool that made it, in place of the pruned model."
        raise ArtifactError(path, problem, fix)
    return mask_OI


KIND = Kind("pruned", "a Hugging Face folder of a pruned model", lambda path: path.is_dir(), read)
