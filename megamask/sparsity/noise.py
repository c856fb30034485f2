"""Keyed noise: Philox4x32-10 (Salmon et al., SC'11), a counter-based generator.

The words are a function of (seed, step, micro-batch, parameter, group) alone, so a sample can be
repeated anywhere: on another tensor-parallel rank, after a resume, under activation recompute, in
the backward pass.

Layout of the 128-bit counter and the 64-bit key:

    c0  group id, low 32 bits            k0  seed
    c1  group id, high bits << 8 | word block (words 4 b .. 4 b + 3 of the group)
    c2  parameter id                     k1  step
    c3  global micro-batch
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
ROUNDS = 10
INITIAL_STEP = _LOW  # of noise that is drawn before the first step


@dataclass(frozen=True)
class NoiseKey:
    """Names one sample of one parameter. All fields are unsigned 32-bit."""

    seed: int
    step: int
    micro_batch: int = 0
    parameter: int = 0

    def of(self, parameter: int) -> NoiseKey:
        """The same sample of another parameter."""
        return replace(self, parameter=parameter)


def parameter_ids(names: Iterable[str]) -> dict[str, int]:
    """Stable 32-bit ids of parameter names, the same in every layout."""
    ids = {name: zlib.crc32(name.encode()) for name in names}
    if len(set(ids.values())) != len(ids):  # 2e4 names collide with probability 0.05
        ids = {name: position for position, name in enumerate(sorted(ids))}
    return ids


def philox(counter: tuple[torch.Tensor, ...], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Four 32-bit words (held in int64) for each element of a 4-tuple of int64 counters that
    broadcast.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def _multiply(value: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    product = value * factor  # the 64 bits are right although int64 reads them as signed
    return (product >> 32) & _LOW, product & _LOW


def words(key: NoiseKey, group_id: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` words for each group, (count, *group_id.shape) int64 in [0, 2^32)."""
    device = group_id.device
    low, high = group_id & _LOW, group_id >> 32
    parameter = torch.tensor(key.parameter, device=device)
    micro_batch = torch.tensor(key.micro_batch, device=device)
    blocks = [
        philox((low, (high << 8) | block, parameter, micro_batch), (key.seed, key.step))
        for block in range((count + 3) // 4)
    ]
    return torch.stack([word for block in blocks for word in block])[:count]


def uniform(word: torch.Tensor) -> torch.Tensor:
    """fp32 in (0, 1), exact: (23 high bits + 1/2) / 2^23, so that neither 0 nor 1 can appear."""
    return ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23
