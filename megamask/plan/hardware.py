"""The devices that a plan compares.

Peaks come from the makers' data sheets (dense, without sparsity). The shares of the peaks that
kernels reach were measured on an H100 (``benchmarks/results/2026-11-26-gpu``); an H200 has the same
chip and the same shares. Those of an A100 and of links are assumptions of this model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import psutil

from megamask.process.cores import usable_cores

GIB = 2.0**30
CONTEXT_BYTES = 1.5 * GIB  # CUDA context, cuBLAS workspaces, NCCL buffers
FRAGMENTATION = 0.05  # the share of a step's memory that the allocator cannot use
GPUS_A_NODE = 8
# The host's work on one layer of one micro-batch, forward and backward; a faster device waits.
LAUNCH_SECONDS = 1e-3
# A dense step of 16 micro-batches on an H100 (4 layers of LLaMA-2-7B, 4,096 tokens each) took 706
# and 710 ms. Its passes at the copy rate take 75 of them. Its matmuls and attention would take 512
# at the rates that they reach alone: in the step they reach 81 % of these rates. Why is not
# measured; a clock that falls under the limit of power would do it.
STEADY = 0.81


@dataclass(frozen=True)
class Device:
    """The capacity and the rates of one device.

    Attributes:
        title: the name that is printed.
        capacity: bytes that a process can get.
        flops: peak of a dense bf16 matmul, in FLOP per second.
        bandwidth: peak of the memory, in bytes per second.
        node_link: link to a neighbour in the node, in bytes per second each way.
        fabric: link to another node, in bytes per second each way and device.
        matmul: the share of ``flops`` that the matmuls of a training step reach.
        attention: the share of ``flops`` that attention reaches.
        copy: the share of ``bandwidth`` that elementwise kernels and optimizers reach.
        link: the share of a link that a collective reaches.
        steady: the share of the rates of ``matmul`` and ``attention``, which are those of
            milliseconds of one kernel, that a step of a second keeps up; 1 where the shares are
            assumptions of a step already.
        group_seconds: arithmetic of the sampling, (forward, backward), in seconds per logit; 0
            where memory is the limit.
        is_cpu: whether the device is the CPU of this machine.
    """

    title: str
    capacity: float
    flops: float
    bandwidth: float
    node_link: float
    fabric: float
    matmul: float
    attention: float
    copy: float = 0.8
    link: float = 0.75
    steady: float = 1.0
    group_seconds: tuple[float, float] = (0.0, 0.0)
    is_cpu: bool = False

    def shared_by(self, ranks: int) -> Device:
        """The part of each rank, where all of them share the device: the cores of one machine."""
        forward, backward = self.group_seconds
        return replace(
            self,
            capacity=self.capacity / ranks,
            flops=self.flops / ranks,
            bandwidth=self.bandwidth / ranks,
            group_seconds=(forward * ranks, backward * ranks),
        )

    @property
    def matmul_rate(self) -> float:
        """FLOP per second of the matmuls of a step."""
        return self.flops * self.matmul * self.steady

    @property
    def attention_rate(self) -> float:
        """FLOP per second of the attention of a step."""
        return self.flops * self.attention * self.steady

    def allowance(self, working: float) -> float:
        """Bytes of the CUDA context and of fragmentation.

        Args:
            working: bytes that a step takes and gives back.
        """
        return 0.0 if self.is_cpu else CONTEXT_BYTES + FRAGMENTATION * working


H100 = Device(
    "H100 80GB",
    79.2 * GIB,
    989e12,
    3.35e12,
    450e9,
    50e9,
    matmul=0.80,
    attention=0.39,
    copy=0.87,
    steady=STEADY,
)
GPUS = {
    "a100-40": Device(
        "A100 40GB", 39.4 * GIB, 312e12, 1.555e12, 300e9, 25e9, matmul=0.70, attention=0.45
    ),
    "a100": Device(
        "A100 80GB", 79.2 * GIB, 312e12, 2.039e12, 300e9, 25e9, matmul=0.70, attention=0.45
    ),
    "h100": H100,
    "h200": replace(H100, title="H200 141GB", capacity=139.8 * GIB, bandwidth=4.8e12),
}


def device_named(name: str) -> Device:
    """A GPU of the table, or ``cpu``: this machine, with the rates of a core with AVX-512 and AMX
    as measured in docs/log.md.

    Sampling (2:4, bf16 weights, fp32 logits) took one core 12.0 ns a group forward and 14.5
    backward alone, and about 20 each inside a learning step, where the logits come from memory; the
    plan uses the latter.
    """
    return GPUS[name] if name in GPUS else _this_cpu()


def _this_cpu() -> Device:
    cores = len(usable_cores())
    return Device(
        title=f"CPU, {cores} cores",
        capacity=float(psutil.virtual_memory().total),
        flops=0.29e12 * cores,
        bandwidth=30e9,
        node_link=5e9,
        fabric=1e9,
        matmul=0.75,
        attention=0.3,
        group_seconds=(
            20e-9 / 6 / cores,
            20e-9 / 6 / cores,
        ),  # measured at 2:4, 6 logits a group; linear fits too
        is_cpu=True,
    )
