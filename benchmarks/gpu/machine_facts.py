"""Print the facts that explain a failure on a strange machine: card, versions, whether the host's
name resolves, the key of Triton's cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import socket
import subprocess
import sys

CLOCKS = "clocks.sm,clocks.mem,power.draw,temperature.gpu"


def main() -> int:
    """Print one fact a line."""
    for name, value in facts().items():
        print(f"- {name}: {value}")
    return 0


def facts() -> dict[str, object]:
    """The facts by name."""
    found: dict[str, object] = {"python": platform.python_version(), "cores": os.cpu_count()}
    found |= {
        "host name": "resolves" if _resolves() else "does not resolve",
        "C compiler": shutil.which("cc") or shutil.which("gcc") or "none",
        "ncu": shutil.which("ncu") or "none",
        "compute-sanitizer": shutil.which("compute-sanitizer") or "none",
    }
    import torch

    found["torch"] = torch.__version__
    found["numpy"] = __import__("numpy").__version__
    with contextlib.suppress(ImportError):
        import triton

        found |= {"triton": triton.__version__, "triton key": triton_key()[:12]}
    if torch.cuda.is_available():
        names = "name,memory.total,driver_version,clocks.max.sm,power.limit"
        command = ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"]
        found["card"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        cusparselt = torch.backends.cusparselt
        found["cuSPARSELt"] = cusparselt.version() if cusparselt.is_available() else "none"
    return found


def clocks() -> str:
    """Clocks, power and temperature of the card now: a card below its clock makes a slow figure."""
    command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    return ""


def triton_key() -> str:
    """A digest of Triton's own part of its cache keys. Kernels that were compiled elsewhere are
    found only where it is the same.
    """
    try:
        from triton.runtime.cache import triton_key as key
    except ImportError:
        from triton.compiler.compiler import triton_key as key
    return hashlib.sha256(key().encode()).hexdigest()


def _resolves() -> bool:
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
