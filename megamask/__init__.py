"""megamask: learn N:M sparsity masks for frozen language models."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# What a user of mask files needs, imported when first asked for: ``import megamask`` alone loads no
# torch.
_LAZY = {
    "load_masks": "megamask.masks.file",
    "save_masks": "megamask.masks.file",
    "apply_masks": "megamask.masks.apply",
    "swap": "megamask.masks.swap",
    "Masks": "megamask.masks.swap",
    "verify": "megamask.masks.verify",
    "accelerate": "megamask.runtime.accelerate",
}
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
