"""Bytes that the passes between the matmuls move, as they run: on a GPU the fused kernels of
``parallel.fused``, PyTorch's norms and separate passes for the rest; on a CPU separate passes.

The passes of a GPU are those that a profile of an H100 shows
(``benchmarks/results/2026-11-26-gpu``). Numbers in the formulas are bytes of bf16, which fp32
doubles.

Legend: H hidden, Q and K the widths of this rank's queries and keys, F of its feed-forward.
"""

from __future__ import annotations

from typing import NamedTuple

from megamask.model.fused.coverage import covers_activation, covers_rotation
from megamask.plan.hardware import Device
from megamask.plan.workload import Workload


class Moved(NamedTuple):
    """Bytes per token and layer of a forward and of a backward pass."""

    forward: float
    backward: float


def elementwise_bytes(work: Workload, device: Device) -> Moved:
    """What moves without the activation.

    On a GPU a norm reads and writes once forward, and backward reads its input and a gradient and
    writes another; a residual adds two tensors in each direction. The heads of attention's output
    become one tensor forward, and the gradients of q, k and v backward.
    """
    arch, tp = work.arch, work.tp
    hidden = arch.hidden / (tp if work.config.parallel.sequence_parallel else 1)
    q, k = arch.heads * arch.head_dim / tp, arch.kv_heads * arch.head_dim / tp
    if device.is_cpu:
        # 36 H for a norm with fp32 inside and 6 H for a residual, twice; 24 (Q + K)
        forward = 84 * hidden + 24 * (q + k)
        return _in_dtype(work, forward, 2 * forward)
    norms = 2 * arch.pre_norms + 2 * arch.post_norms
    turned, turned_back = 0, 0
    if arch.ropes:
        fused = work.config.parallel.fused and covers_rotation(arch)
        turned, turned_back = (4, 4) if fused else (24, 48)
    return _in_dtype(
        work,
        (4 * norms + 2 * 6) * hidden + turned * (q + k) + 4 * q,
        (6 * norms + 2 * 6) * hidden + turned_back * (q + k) + 4 * (q + 2 * k),
    )


def fuses_activation(work: Workload, device: Device) -> bool:
    """Whether the kernel of ``parallel.fused`` computes the gated activation."""
    return not device.is_cpu and work.config.parallel.fused and covers_activation(work.arch)


def gated_bytes(work: Workload, device: Device) -> Moved:
    """What the activation moves, with a gate in separate passes or in a kernel, or without one."""
    forward, backward = (4, 8)
    if work.arch.gated:
        forward, backward = (6, 10) if fuses_activation(work, device) else (14, 28)
    wide = work.ffn / work.tp
    return _in_dtype(work, forward * wide, backward * wide)


def hidden_match_bytes(work: Workload) -> float:
    """Bytes per token and layer that the comparison with the dense model's layers moves: separate
    passes in fp32 over the error and two sums of squares, and eight numbers in the dtype of the
    model, which are the kept state, the error's gradient and its sum with what comes from above.
    """
    split = work.tp if work.config.parallel.sequence_parallel else 1
    return (56.0 + 8 * work.width) * work.arch.hidden / split


def _in_dtype(work: Workload, forward: float, backward: float) -> Moved:
    return Moved(forward * work.width / 2, backward * work.width / 2)


def loss_bytes(work: Workload, device: Device) -> float:
    """Bytes per token that the loss and its gradient move. A logit becomes fp32, is read for the
    largest, shifted, exponentiated, summed, scaled and written back in the dtype of the model:
    forty bytes of fp32 and two numbers. A block of logits stays in the cache of a CPU, which counts
    six passes of 4 bytes.
    """
    a_logit = 24 if device.is_cpu else 40 + 2 * work.width
    return float(a_logit * work.vocab_rows)
