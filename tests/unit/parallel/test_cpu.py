"""The capabilities that a CPU reports."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megamask.parallel.cpu import emulates_bf16


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, True),
        ({"avx512_bf16": True, "amx_bf16": False}, False),
        ({"neon": True, "bf16": False}, True),
        ({"neon": True, "bf16": True}, False),
        ({"architecture": "unknown"}, False),
    ],
)
def test_emulated_bf16_is_known(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, Any], expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert emulates_bf16() is expected


def test_a_pytorch_that_cannot_tell_claims_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not emulates_bf16()
