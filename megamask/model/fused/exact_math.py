"""The functions of CUDA's maths library that PyTorch's kernels call, for Triton kernels that give
PyTorch's bits. Triton's own exp and division are approximate, and its cosine has another rounding.

The interpreter, which has no device library, takes numpy's.
"""

from __future__ import annotations

# triton's decorators carry no types, and its annotations are values, not types
# mypy: ignore-errors
import os

import triton
import triton.language as tl
from triton.language.extra import libdevice

_HARDWARE = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")


@triton.jit
def exp(x):
    """expf."""
    return libdevice.exp(x) if _HARDWARE else tl.exp(x)


@triton.jit
def cos(x):
    """cosf."""
    return libdevice.cos(x) if _HARDWARE else tl.cos(x)


@triton.jit
def sin(x):
    """sinf."""
    return libdevice.sin(x) if _HARDWARE else tl.sin(x)
