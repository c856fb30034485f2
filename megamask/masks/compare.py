"""How far two sets of masks are apart."""

from __future__ import annotations

from megamask.errors import ArtifactError
from megamask.masks.file import MaskSet


def disagreement(a: MaskSet, b: MaskSet) -> dict[str, float]:
    """Share of groups whose candidate differs, by HF module name.

    Raises:
        ArtifactError: another pattern, other linears or shapes.
    """
    b.check(pattern=a.pattern, shapes={name: a.shape(name) for name in a})
    a.check(shapes={name: b.shape(name) for name in b})
    if a.fingerprint != b.fingerprint:
        raise ArtifactError(b.path, f"belongs to another base model than {a.path}", "Compare masks of one model.")
    return {name: (a.index(name) != b.index(name)).double().mean().item() for name in a}
