"""What the card can do at LLaMA-2-7B's shapes, and which of several ways to do a thing is fastest:
matmuls, the sum of dW over micro-batches, attention, SwiGLU, RoPE.

``python -m benchmarks.gpu.ceilings --json ceilings.json``; ``megamask plan --calibrate
ceilings.json`` plans with the rates.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import copy_bandwidth, interleave, now, table
from benchmarks.gpu.machine_facts import clocks
from megamask.model.fused.rotation import rotate
from megamask.model.fused.swiglu import swiglu
from megamask.storage import write_json
from megamask.user_paths import path_argument

TOKENS, HIDDEN, FFN, HEADS, HEAD = 4096, 4096, 11008, 32, 128
SIDE = 8192
ROUNDS, CALLS = 7, 5
MATMUL = f"matmul of {SIDE} x {SIDE} x {SIDE}"
ATTENTION = "causal attention, forward and backward"
STEADY = f"the same {MATMUL} for seconds"
SECONDS, BATCH = 4.0, 50
CUDA = torch.device("cuda")


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    options = read_options(argv)
    copied = copy_bandwidth(CUDA, 2 << 30)
    print(f"copy, read plus written: {copied / 1e9:,.0f} GB/s")
    product, scores = 2 * SIDE**3, 6 * TOKENS**2 * HIDDEN  # as megamask.plan.time counts
    dw = 2 * TOKENS * HIDDEN * 2 * FFN
    figures: dict[str, Any] = {"card": torch.cuda.get_device_name(CUDA)}
    for title, sides, flops in (
        (MATMUL, largest(), product),
        ("sum of dW in fp32", sums(), dw),
        (ATTENTION, attentions(), scores),
        ("SwiGLU, forward and backward", swiglus(), None),
        ("rotation of queries, forward and backward", rotations(), None),
    ):
        figures[title] = measure(title, sides, flops)
    figures[STEADY] = steady(largest()["bf16"], product)
    figures["rates"] = {
        "matmul": product / figures[MATMUL]["bf16"] * 1e3,
        "attention": scores / figures[ATTENTION]["default"] * 1e3,
        "copy": copied,
    }
    if options.json:
        write_json(options.json, figures)
    return 0


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--json", type=path_argument)
    return options.parse_args(argv)


def measure(
    title: str, sides: dict[str, Callable[[], Any]], flops: float | None
) -> dict[str, float]:
    """Milliseconds a call of every side."""
    timings = interleave(sides, ROUNDS, CUDA, warmup=2, calls=CALLS)
    found = {name: 1e3 * timings.median(name) for name in sides}
    rows = [[name, ms, *([flops / ms / 1e9] if flops else [])] for name, ms in found.items()]
    table(title, ["way", "ms", *(["TFLOP/s"] if flops else [])], rows)
    return found


def steady(work: Callable[[], Any], flops: float) -> dict[str, Any]:
    """The rate of a product that is made without a pause, by second, and clock and power after each
    second: a step of seconds may not keep the rate of the first milliseconds.
    """
    begin, rows = now(CUDA), []
    while now(CUDA) - begin < SECONDS:
        start, calls = now(CUDA), 0
        while now(CUDA) - start < 1.0:
            for _ in range(BATCH):
                work()
            calls += BATCH
        rate = calls * flops / (now(CUDA) - start)
        for _ in range(10 * BATCH):  # the card works while its clock is read
            work()
        rows.append({"TFLOP/s": rate / 1e12, "clock": clocks()})
    table(STEADY, ["TFLOP/s", "clock, power"], [list(row.values()) for row in rows])
    return {"seconds": rows}


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Values from N(0, 1) on the card."""
    return torch.randn(*shape, device=CUDA, dtype=dtype)


def largest() -> dict[str, Callable[[], Any]]:
    """A product that leaves the card nothing to wait for."""
    left, right = random(SIDE, SIDE), random(SIDE, SIDE)
    return {"bf16": lambda: left @ right}


def sums() -> dict[str, Callable[[], Any]]:
    """dW of fc1, added to a buffer in fp32: by a pass of its own, or by the matmul."""
    x, dy = random(TOKENS, HIDDEN), random(TOKENS, 2 * FFN)
    total = torch.zeros(2 * FFN, HIDDEN, device=CUDA)

    def in_the_matmul() -> None:
        torch.addmm(total, dy.t(), x, out_dtype=torch.float32, out=total)

    def fp32_result() -> None:
        total.add_(torch.mm(dy.t(), x, out_dtype=torch.float32))

    ways: dict[str, Callable[[], Any]] = {
        "dW alone, bf16": lambda: dy.t() @ x,
        "bf16, then added": lambda: total.add_(dy.t() @ x),
        "fp32, then added": fp32_result,
        "in the matmul": in_the_matmul,
    }
    return _those_that_run(ways)


def attentions() -> dict[str, Callable[[], Any]]:
    """Every backend of PyTorch's attention."""
    q, k, v = (random(1, HEADS, TOKENS, HEAD).requires_grad_() for _ in range(3))
    grad = random(1, HEADS, TOKENS, HEAD)

    def attention(*backends: SDPBackend) -> Callable[[], Any]:
        def run() -> None:
            with sdpa_kernel(list(backends)):
                F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(grad)
            q.grad = k.grad = v.grad = None

        return run

    def default() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(grad)
        q.grad = k.grad = v.grad = None

    def deterministic() -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            default()
        finally:
            torch.use_deterministic_algorithms(False)

    return _those_that_run(
        {
            "default": default,
            "flash": attention(SDPBackend.FLASH_ATTENTION),
            "cudnn": attention(SDPBackend.CUDNN_ATTENTION),
            "efficient": attention(SDPBackend.EFFICIENT_ATTENTION),
            "default, deterministic": deterministic,
        }
    )


def swiglus() -> dict[str, Callable[[], Any]]:
    """As the model runs it with and without its kernels, and Megatron's fusion."""
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    both, grad = random(TOKENS, 1, 2 * FFN).requires_grad_(), random(TOKENS, 1, FFN)

    def plain() -> None:
        gate, up = both.chunk(2, -1)
        (F.silu(gate) * (up + 0.0)).backward(grad)
        both.grad = None

    def fused() -> None:
        bias_swiglu_impl(both, None, False, False).backward(grad)
        both.grad = None

    def ours() -> None:
        swiglu(both).backward(grad)
        both.grad = None

    return _those_that_run({"separate passes": plain, "Megatron's fusion": fused, "ours": ours})


def rotations() -> dict[str, Callable[[], Any]]:
    """By Megatron's passes and by the model's kernel, of queries that a fused linear made and with
    a gradient as attention leaves it.
    """
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    t = random(TOKENS, 1, HEADS, 3 * HEAD)[..., :HEAD].requires_grad_()
    grad = random(1, HEADS, TOKENS, HEAD).permute(2, 0, 1, 3)
    half = torch.outer(torch.arange(TOKENS), 1e4 ** -(torch.arange(HEAD // 2) / (HEAD // 2)))
    angles = torch.cat([half, half], -1)[:, None, None].to(CUDA)

    def by(way: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            way(t, angles).backward(grad)
            t.grad = None

        return run

    return _those_that_run({"separate passes": by(_apply_rotary_pos_emb_bshd), "ours": by(rotate)})


def _those_that_run(ways: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """The ways that this machine's software has; what another way says is printed."""
    found = {}
    for name, way in ways.items():
        try:
            way()
        except Exception as error:  # whatever a library that lacks it raises
            print(f"{name}: not possible here: {str(error).splitlines()[0]}")
        else:
            found[name] = way
    return found


if __name__ == "__main__":
    sys.exit(main())
