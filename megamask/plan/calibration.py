"""Measured rates of a device in the place of the assumed ones.

``python -m benchmarks.gpu.ceilings --json FILE`` measures them. ``FILE``, or ``results.json`` of
``benchmarks/gpu.sh``, holds ``card``, the name that PyTorch gives the device, and ``rates``:

    matmul      FLOP per second of a large bf16 product
    attention   FLOP per second of causal attention, forward and backward, counted as in
                ``time.flops_per_token``
    copy        bytes per second, read plus written, of a large copy
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megamask.errors import ArtifactError
from megamask.plan.hardware import GPUS, STEADY, Device
from megamask.storage import read_json

KINDS = ("matmul", "attention", "copy")
FIX = "Make it with: python -m benchmarks.gpu.ceilings --json FILE"


def calibrated(path: Path) -> tuple[str, Device]:
    """The GPU of the table that was measured, by name, with its measured rates.

    Args:
        path: a file of the kind above.

    Raises:
        ArtifactError: the file cannot be read, lacks a rate, names a card that is not in the table,
            or has a rate that is not between 0 and the peak of the card.
    """
    record = _read(path)
    rates = record.get("rates")
    if not isinstance(rates, Mapping) or not set(KINDS) <= rates.keys():
        raise ArtifactError(path, f"holds no measured rates {', '.join(KINDS)}", FIX)
    name = _name_of(path, record.get("card"))
    device = GPUS[name]
    peaks = dict(zip(KINDS, (device.flops, device.flops, device.bandwidth), strict=True))
    for kind, peak in peaks.items():
        rate = rates[kind]
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= peak:
            problem = f"has rates.{kind} = {rate!r}, which is not between 0 and the peak {peak:.4g}"
            raise ArtifactError(path, problem, FIX)
    shares = {kind: rates[kind] / peak for kind, peak in peaks.items()}
    return name, replace(device, title=f"{device.title}, measured", steady=STEADY, **shares)


def _read(path: Path) -> Mapping[str, Any]:
    record = read_json(path, FIX)
    for key in ("parts", "ceilings", "result"):  # results.json of a lease
        if isinstance(record, dict) and key in record:
            record = record[key]
    if not isinstance(record, dict):
        raise ArtifactError(path, "holds no measured rates", FIX)
    return record


def _name_of(path: Path, card: object) -> str:
    """The GPU of the table with this name of PyTorch, such as NVIDIA H100 80GB HBM3."""
    words = str(card).lower().replace("-", " ").split()
    fitting = [name for name in GPUS if name.partition("-")[0] in words]
    if len(fitting) > 1:  # an A100 has 40 or 80 GB
        small = any(word.startswith("40gb") for word in words)
        fitting = [name for name in fitting if name.endswith("-40") == small]
    if not fitting:
        known = ", ".join(device.title for device in GPUS.values())
        raise ArtifactError(path, f"was measured on {card!r}; the planner knows {known}", FIX)
    return fitting[0]
