"""A Hugging Face folder of a pruned model: the mask of a linear keeps the weights other than zero.

A weight that is zero in the base model too may be kept or pruned. Where a group has fewer than N
weights other than zero, it keeps the zeros of the base model, if there are just enough of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megamask.errors import ArtifactError
from megamask.masks.foreign.kind import Base, Kind
from megamask.masks.shapes_fit import check_shapes
from megamask.sparsity.pattern import Pattern
from megamask.weights.architecture import read_architecture
from megamask.weights.hf_files import open_checked
from megamask.weights.mapping import expected_tensors, linear_shapes

UPDATED = (
    "A mask belongs to frozen weights: use the pruned model itself, or name the base model that it "
    "was pruned from."
)


def read(path: Path, base: Base) -> Iterator[tuple[str, Tensor]]:
    """The masks of a folder; a linear that equals the base model's has none. The arguments and
    errors are those of ``Kind.read``.
    """
    arch = read_architecture(path, base.ignore_keys)
    shapes = linear_shapes(arch)
    check_shapes(path, shapes, base.shapes, "base model")
    with open_checked(path, base.ignore_keys) as reader:
        for name in shapes:
            pruned_OI = reader.tensor(f"{name}.weight")
            base_OI = base.weights.tensor(f"{name}.weight").to(pruned_OI.dtype)
            if not torch.equal(pruned_OI, base_OI):
                yield name, _mask(path, name, pruned_OI, base_OI, base.pattern)
        linears = {f"{name}.weight" for name in shapes}
        for name in expected_tensors(arch).keys() - linears:
            tensor = reader.tensor(name)
            if not torch.equal(tensor, base.weights.tensor(name).to(tensor.dtype)):
                problem = f"has another {name} than the base model: the weights were updated"
                raise ArtifactError(path, problem, UPDATED)


def _mask(path: Path, name: str, pruned_OI: Tensor, base_OI: Tensor, pattern: Pattern) -> Tensor:
    """The mask of a linear whose weights were pruned.

    Raises:
        ArtifactError: weights were updated, or the zeros are not those of one mask of the pattern.
    """
    mask_OI = pruned_OI != 0
    changed = int((mask_OI & (pruned_OI != base_OI)).sum())
    if changed:
        problem = (
            f"has {changed:,} weights of {name} that are neither zero nor the base model's "
            f"in {str(base_OI.dtype).removeprefix('torch.')}: the weights were updated"
        )
        raise ArtifactError(path, problem, UPDATED)
    if mask_OI.shape[1] % pattern.m:
        return mask_OI
    kept_OG = mask_OI.unflatten(1, (-1, pattern.m)).sum(-1)
    too_few_O1 = (kept_OG < pattern.n).repeat_interleave(pattern.m, 1)
    mask_OI = mask_OI | (too_few_O1 & (base_OI == 0))
    ambiguous = (kept_OG < pattern.n) & (mask_OI.unflatten(1, (-1, pattern.m)).sum(-1) > pattern.n)
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
