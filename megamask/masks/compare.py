"""How far two sets of masks are apart."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from megamask.errors import ArtifactError
from megamask.masks.file import MaskSet
from megamask.sparsity.pattern import Pattern


@dataclass(frozen=True)
class Difference:
    """Counts over two masks of the same weights; those of several linears add up.

    Attributes:
        weights: how many there are.
        weights_differ: kept by one of the masks only.
        kept_by_both: kept by both.
        groups: of m weights; 0 when the masks have different m.
        groups_differ: in which not the same weights are kept.
    """

    weights: int = 0
    weights_differ: int = 0
    kept_by_both: int = 0
    groups: int = 0
    groups_differ: int = 0

    def __add__(self, other: Difference) -> Difference:
        return Difference(
            *(one + two for one, two in zip(astuple(self), astuple(other), strict=True))
        )

    def shares(self) -> dict[str, float | None]:
        """Share of groups that differ (None where groups cannot be compared), of weights that
        differ, of weights kept by both.
        """
        of_weights = {
            key: getattr(self, key) / self.weights for key in ("weights_differ", "kept_by_both")
        }
        return {
            "groups_differ": self.groups_differ / self.groups if self.groups else None,
            **of_weights,
        }


def unrelated(a: Pattern, b: Pattern) -> dict[str, float | None]:
    """The shares of ``Difference.shares`` to expect of masks that have nothing to do with each
    other.
    """
    both = a.density * b.density
    groups = 1 - 1 / a.num_candidates if a == b else None
    return {
        "groups_differ": groups,
        "weights_differ": a.density + b.density - 2 * both,
        "kept_by_both": both,
    }


def differences(a: MaskSet, b: MaskSet) -> dict[str, Difference]:
    """How the masks of every linear that both have differ, by HF module name. Groups are compared
    where the patterns are equal.

    Raises:
        ArtifactError: another base model, another shape, or no linear in common.
    """
    if a.fingerprint != b.fingerprint:
        raise ArtifactError(
            b.path, f"belongs to another base model than {a.path}", "Compare masks of one model."
        )
    common = [name for name in a if name in b]
    if not common:
        raise ArtifactError(
            b.path, f"has no linear in common with {a.path}", "Compare masks of the same linears."
        )
    b.check(
        shapes={**{name: b.shape(name) for name in b}, **{name: a.shape(name) for name in common}}
    )
    return {name: _difference(a, b, name) for name in common}


def _difference(a: MaskSet, b: MaskSet, name: str) -> Difference:
    ours, theirs = a[name], b[name]
    differ = ours ^ theirs
    counts = differ.numel(), int(differ.sum()), int((ours & theirs).sum())
    if a.pattern != b.pattern:
        return Difference(*counts)
    groups = differ.unflatten(1, (-1, a.pattern.m)).any(-1)
    return Difference(*counts, groups.numel(), int(groups.sum()))
