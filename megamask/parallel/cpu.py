"""What this machine's CPU can do."""

from __future__ import annotations

import torch


def emulates_bf16() -> bool:
    """Whether this CPU is known to have no bf16 instructions for matmuls.

    oneDNN then emulates bf16 matmuls at about a fifth of the fp32 speed. The answer is False where
    PyTorch is too old to tell (``torch.cpu.get_capabilities`` is missing).
    """
    read = getattr(torch.cpu, "get_capabilities", dict)
    names = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # x86 and ARM
    present = [there for name, there in read().items() if name in names]
    return bool(present) and not any(present)
