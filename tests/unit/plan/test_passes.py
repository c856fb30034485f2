"""The passes between the matmuls, as they run with and without the fused kernels, and what a plan
made of them says of the steps that were measured on an H100.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megamask.config import load_config
from megamask.model.fused.coverage import covers_activation, covers_rotation
from megamask.plan.calibration import calibrated
from megamask.plan.hardware import GPUS, Device, device_named
from megamask.plan.memory import EVALUATION, LAYER, ONE_LAYER, memory_of
from megamask.plan.passes import elementwise_bytes, gated_bytes, loss_bytes
from megamask.plan.saved_tensors import layer_activations, recomputed_activations
from megamask.plan.time import (
    ATTENTION,
    ELEMENTWISE,
    HEAD,
    MATMULS,
    RECOMPUTE,
    TEACHER,
    Time,
    time_of,
)
from megamask.plan.workload import Workload
from megamask.weights.shapes import read_shape
from tests.fork_server import ROOT

RESULTS = ROOT / "benchmarks/results/2026-11-26-gpu"
H100 = GPUS["h100"]
H, F = 4096, 11008  # of LLaMA-2-7B, whose Q and K are H too
RATE = 3.35e12 * 0.87


def plan(*settings: str, model: str = "llama2-7b", layers: int = 32) -> Workload:
    shape = ("learn.micro_batch=1", "data.seq_length=4096", "learn.global_batch=16")
    config = load_config(None, ["learn.method=subset", *shape, *settings])
    arch = read_shape(model)
    return Workload(config, replace(arch, num_layers=min(layers, arch.num_layers)))


def test_passes_of_a_gpu_by_hand() -> None:
    """Two norms, two residuals, joins and the rotation, forward and backward, in bf16."""
    apart = plan("parallel.fused=false")
    for work, turned in ((plan(), (4, 4)), (apart, (24, 48))):
        moved = elementwise_bytes(work, H100)
        assert moved.forward == (2 * 4 + 2 * 6) * H + 4 * H + turned[0] * 2 * H
        assert moved.backward == (2 * 6 + 2 * 6) * H + 4 * 3 * H + turned[1] * 2 * H
    assert gated_bytes(plan(), H100) == (6 * F, 10 * F)
    assert gated_bytes(apart, H100) == (14 * F, 28 * F)
    assert loss_bytes(plan(), H100) == 44 * 32000


def test_a_cpu_runs_the_passes_apart() -> None:
    cpu = device_named("cpu")
    assert elementwise_bytes(plan(), cpu) == elementwise_bytes(plan("parallel.fused=false"), cpu)
    assert elementwise_bytes(plan(), cpu).forward == 84 * H + 24 * 2 * H
    assert gated_bytes(plan(), cpu) == (14 * F, 28 * F)
    assert loss_bytes(plan(), cpu) == 24 * 32000


def test_fp32_moves_twice_as_much_but_for_the_losses_own_passes() -> None:
    wide = plan("dtype=fp32")
    for count in (elementwise_bytes, gated_bytes):
        assert count(wide, H100) == tuple(2 * one for one in count(plan(), H100))
    assert loss_bytes(wide, H100) == 48 * 32000


@pytest.mark.parametrize(
    ("model", "activation", "rotation"),
    [("llama2-7b", True, True), ("gemma-3-1b", False, True), ("nemotron-4-15b", False, False)],
)
def test_a_model_that_the_kernels_do_not_cover_keeps_its_passes(
    model: str, activation: bool, rotation: bool
) -> None:
    """Gemma has a gated GELU; Nemotron squares a ReLU, without a gate, and turns half a head."""
    fused, apart = plan(model=model), plan("parallel.fused=false", model=model)
    assert (covers_activation(fused.arch), covers_rotation(fused.arch)) == (activation, rotation)
    assert (gated_bytes(fused, H100) < gated_bytes(apart, H100)) == activation
    assert (elementwise_bytes(fused, H100) < elementwise_bytes(apart, H100)) == rotation


def test_the_fused_activation_saves_its_input_alone() -> None:
    """Two F a token in the place of four, in the layers and in what ``recompute=mlp`` makes again;
    three in the place of five at once in an evaluation. A CPU runs separate passes.
    """
    fused, apart = plan(), plan("parallel.fused=false")
    tokens = 4096
    for layers in (layer_activations, recomputed_activations):
        some = [plan(f"parallel.fused={on}", "parallel.recompute=mlp") for on in ("true", "false")]
        kept = [layers(work, 0, H100) for work in some]
        assert kept[1] - kept[0] == tokens * 2 * 2 * F
    assert recomputed_activations(some[0], 0, H100) == tokens * 2 * 3 * F
    cpu = device_named("cpu")
    assert layer_activations(fused, 0, cpu) == layer_activations(apart, 0, H100)
    long = ("evaluate.window=4096", "evaluate.micro_batch=2")
    at = [
        memory_of(plan(*long, f"parallel.fused={on}"), H100).moments[EVALUATION]
        for on in ("true", "false")
    ]
    # The fused activation's three are fewer than the output of the first linear beside its weight.
    wide, masked = 2 * tokens * 2 * F, 2 * 2 * H * F
    assert at[0][LAYER] == 2 * wide and at[0][ONE_LAYER] == masked < 3 * wide
    assert at[1][LAYER] == 5 * wide and ONE_LAYER not in at[1]


def test_parts_of_a_step_follow_the_passes() -> None:
    parts = time_of(plan(), H100).parts
    a_layer = 20 * H + 24 * H + 16 * H + 16 * H + 16 * F
    assert parts[ELEMENTWISE] == pytest.approx(16 * 4096 * 32 * a_layer / RATE)
    again = time_of(plan("parallel.recompute=true"), H100).parts
    forward = 20 * H + 4 * H + 8 * H + 6 * F
    arithmetic = (parts[MATMULS] + parts[ATTENTION]) / 3
    assert again[RECOMPUTE] == pytest.approx(16 * 4096 * 32 * forward / RATE + arithmetic)
    taught = time_of(plan("learn.distillation.share=1"), H100).parts
    head = parts[HEAD] - 16 * 4096 * 2 * 32000 * H / H100.matmul_rate
    assert taught[TEACHER] == pytest.approx(again[RECOMPUTE] + head)


def arithmetic(planned: Time) -> float:
    """Milliseconds of a dense step."""
    parts = (MATMULS, ATTENTION, HEAD, ELEMENTWISE)
    return 1e3 * sum(planned.parts[part] for part in parts)


def measured(draws: str, side: str) -> float:
    """Milliseconds of a step of the last lease."""
    part = {"micro_batch": "step", "step": "step-one-draw"}[draws]
    record = json.loads((RESULTS / "results.json").read_text())["parts"][part]["result"]
    return float(1e3 * record["figures"]["seconds"][side])


@pytest.fixture(scope="module")
def card() -> Device:
    """The H100 with the rates of its own lease."""
    return calibrated(RESULTS / "results.json")[1]


@pytest.mark.parametrize("draws", ["micro_batch", "step"])
def test_a_plan_is_near_the_steps_that_were_measured(draws: str, card: Device) -> None:
    """Within 3 %. ``STEADY`` is fitted to the dense steps; sampling, sums and optimizer are not."""
    for device in (card, H100):
        work = plan(f"learn.sampling.draws={draws}", layers=4)
        planned = time_of(work, device)
        assert 1e3 * planned.seconds == pytest.approx(measured(draws, "masked"), rel=0.03)
        assert arithmetic(planned) == pytest.approx(measured(draws, "dense"), rel=0.01)
        burst = time_of(work, replace(device, steady=1.0))
        assert 1e3 * burst.seconds != pytest.approx(measured(draws, "masked"), rel=0.1)


def test_a_plan_without_the_kernels_is_near_the_steps_before_them(card: Device) -> None:
    """Dense steps took 795 and 814 ms before SwiGLU and rotation had kernels; nothing is fitted to
    them.
    """
    planned = time_of(plan("parallel.fused=false", layers=4), card)
    assert arithmetic(planned) == pytest.approx((795 + 814) / 2, rel=0.05)
