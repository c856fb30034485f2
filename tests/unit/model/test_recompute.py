"""Frozen biases under every ``parallel.recompute``: equal gradients, and an end."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megamask.config.load import build_config
from megamask.model.build import build_model, masked_linears
from megamask.parallel.mesh import start
from megamask.weights.architecture import read_architecture

ROOT = Path(__file__).resolve().parents[3]
ROOM, SECONDS = 2 << 30, 60  # bytes of memory and seconds that a backward pass of a toy may take


@contextmanager
def limits() -> Iterator[None]:
    """An endless recomputation ends with an error here, in the place of all memory taken."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, before[1]))

    def expire(*_: Any) -> None:
        raise TimeoutError(f"the backward pass took more than {SECONDS} s")

    handler = signal.signal(signal.SIGALRM, expire)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def gradients(recompute: bool | str) -> dict[str, torch.Tensor]:
    """d loss / d weight of every linear of a Llama with biases everywhere."""
    arch = replace(
        read_architecture(ROOT / "configs" / "models" / "tiny-llama.json"),
        attention_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
    )
    config = build_config(
        {"device": "cpu", "dtype": "fp32", "parallel": {"threads": 1, "recompute": recompute}}
    )
    with start(config) as mesh:
        model = build_model(config, arch, mesh)
        noise = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data.normal_(std=0.1, generator=noise)
        linears = masked_linears(model)
        for linear in linears.values():
            linear.weight.requires_grad_(True)
        tokens_BS = torch.randint(512, (2, 16), generator=noise)
        loss = model.token_losses(tokens_BS, tokens_BS.roll(-1, 1)).mean()
        # A frozen bias that a checkpoint returns becomes a result of it: the endless recomputation.
        biases = [name for name, one in model.named_parameters() if not one.is_leaf]
        assert not biases, f"{biases} are results of a computation"
        with limits():
            loss.backward()
        return {name: torch.clone(linear.weight.grad) for name, linear in linears.items()}  # type: ignore[arg-type]


@pytest.mark.parametrize("recompute", ["mlp", True])
def test_a_frozen_bias_can_be_recomputed(recompute: bool | str) -> None:
    plain, again = gradients(False), gradients(recompute)
    assert plain.keys() == again.keys() and len(plain) == 8
    assert all(torch.equal(plain[name], again[name]) for name in plain)
