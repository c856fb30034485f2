"""Which masks, and which weights under them, a row of results or a folder stands for.

A mask whose weights were updated with it, or recovered under it, has the digest of the same mask on
the frozen weights. So rows, cards and reports tell them apart by the functions here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megamask.masks.file import MaskSet

RECOVERED = "recovered"  # of a header's data: how the kept weights were recovered


def recovery_of(header: Mapping[str, Any] | None) -> dict[str, Any]:
    """The facts of a recovery in the header of a mask file; {} where the weights are frozen."""
    data = (header or {}).get("data")
    about = data.get(RECOVERED) if isinstance(data, Mapping) else None
    return dict(about) if isinstance(about, Mapping) else {}


def recovered_label(header: Mapping[str, Any] | None) -> str:
    """``recovered (MASK + METHOD)`` for the header of a recovered model; else ""."""
    about = recovery_of(header)
    return f"{RECOVERED} ({about.get('mask')} + {about.get('method')})" if about else ""


def row_name(name: str, header: Mapping[str, Any] | None) -> str:
    """The name of a row of results.

    The row of a recovered model says that it is one, under whatever name the user asked for it, so
    that no table, picture or file shows it as a result of the frozen weights.

    Args:
        name: the name that the user or the mask file gave.
        header: of the masks.
    """
    label = recovered_label(header)
    if not label:
        return name
    own = (header or {}).get("method")
    return label if name == own else f"{name}, {label}"


def identity(masks: MaskSet) -> dict[str, str]:
    """The digest of the content of masks, the fingerprint of their base model, and where they have
    weights of their own, ``weights``: the fingerprint of recovered weights, or the method that
    updated them.
    """
    found = {"sha256": masks.content_sha256, "fingerprint": masks.fingerprint}
    if masks.has_own_weights:
        found["weights"] = str(recovery_of(masks.meta).get("weights", masks.method))
    return found
