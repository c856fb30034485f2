"""Counts of the weights and groups in which two sets of masks differ."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import astuple, dataclass

from megamask.errors import ArtifactError
from megamask.masks.file import MaskSet
from megamask.sparsity.pattern import Pattern


@dataclass(frozen=True)
class Difference:
    """Counts over two masks of the same weights. The counts of several linears can be added.

    Attributes:
        weights: number of weights.
        weights_differ: number of weights that only one of the two masks keeps.
        kept_by_both: number of weights that both masks keep.
        groups: number of groups of m weights; of linears of the same pattern in
            both masks.
        groups_differ: number of groups in which the masks keep different weights.
    """

    weights: int = 0
    weights_differ: int = 0
    kept_by_both: int = 0
    groups: int = 0
    groups_differ: int = 0

    def __add__(self, other: Difference) -> Difference:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Difference(*(ours + theirs for ours, theirs in pairs))

    def shares(self) -> dict[str, float | None]:
        """The counts as shares of all groups and of all weights.

        ``groups_differ`` is None where groups cannot be compared.
        """
        return {
            "groups_differ": self.groups_differ / self.groups if self.groups else None,
            "weights_differ": self.weights_differ / self.weights,
            "kept_by_both": self.kept_by_both / self.weights,
        }


def unrelated(a: Pattern, b: Pattern) -> dict[str, float | None]:
    """The expected ``Difference.shares`` of two independent random masks of these patterns."""
    both = a.density * b.density
    return {
        "groups_differ": 1 - 1 / a.num_candidates if a == b else None,
        "weights_differ": a.density + b.density - 2 * both,
        "kept_by_both": both,
    }


def chance(a: MaskSet, b: MaskSet) -> dict[str, float | None]:
    """``unrelated`` for the patterns of the linears in both sets: the mean over their weights, and
    over the groups of the linears whose pattern is the same in both.
    """
    sizes: dict[tuple[Pattern, Pattern], int] = defaultdict(int)
    for name in (one for one in a if one in b):
        sizes[a.patterns[name], b.patterns[name]] += math.prod(a.shape(name))
    found = {pair: unrelated(*pair) for pair in sizes}
    means: dict[str, float | None] = {}
    for key in ("groups_differ", "weights_differ", "kept_by_both"):
        known = {
            pair: share for pair, shares in found.items() if (share := shares[key]) is not None
        }
        if len(set(known.values())) <= 1:
            means[key] = next(iter(known.values()), None)
            continue
        count = {pair: sizes[pair] / (pair[0].m if key == "groups_differ" else 1) for pair in known}
        total = sum(share * count[pair] for pair, share in known.items())
        means[key] = total / sum(count.values())
    return means


def differences(a: MaskSet, b: MaskSet) -> dict[str, Difference]:
    """HF module name -> difference, for every linear that has a mask in both sets.

    Groups are compared only in linears that have the same pattern in both sets.

    Raises:
        ArtifactError: the base models or the shapes differ, or no linear has two masks.
    """
    # a mask knows the fingerprint of the fp16 copy of its model too
    if a.fingerprint not in b.fingerprints and b.fingerprint not in a.fingerprints:
        problem = f"belongs to another base model than {a.path}"
        raise ArtifactError(b.path, problem, "Compare masks of one model.")
    common = [name for name in a if name in b]
    if not common:
        problem = f"has no linear in common with {a.path}"
        raise ArtifactError(b.path, problem, "Compare masks of the same linears.")
    own_shapes = {name: b.shape(name) for name in b}
    b.check(shapes=own_shapes | {name: a.shape(name) for name in common})
    return {name: _difference(a, b, name) for name in common}


def _difference(a: MaskSet, b: MaskSet, name: str) -> Difference:
    ours, theirs = a[name], b[name]
    differ = ours ^ theirs
    counts = differ.numel(), int(differ.sum()), int((ours & theirs).sum())
    if a.patterns[name] != b.patterns[name]:
        return Difference(*counts)
    groups = differ.view(len(differ), -1, a.patterns[name].m).any(-1)
    return Difference(*counts, groups.numel(), int(groups.sum()))
