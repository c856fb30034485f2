"""The planner's arithmetic, against sums done by hand for LLaMA-2-7B: 32 layers, H = 4096, F =
11008, 32 heads of 128, 32,000 words.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from megamask.config import load_config
from megamask.errors import ConfigError
from megamask.learn import method as state
from megamask.learn.method import MOMENTS
from megamask.plan.fit import advice, check_fits, check_free, memory_applies, remedies
from megamask.plan.hardware import GIB, GPUS, device_named
from megamask.plan.memory import (
    ACTIVATIONS,
    ALLOWANCE,
    DENSE_LAYERS,
    LOSS,
    ONE_LAYER,
    OTHER_WEIGHTS,
    memory_of,
)
from megamask.plan.saved_tensors import (
    layer_activations,
    recomputed_activations,
    saved_activations,
)
from megamask.plan.time import (
    ATTENTION,
    DP_LINKS,
    HEAD,
    MATMULS,
    OPTIMIZER,
    QUIET,
    RECOMPUTE,
    SAMPLING_BACKWARD,
    SAMPLING_FORWARD,
    TEACHER,
    TP_LINKS,
    flops_per_token,
    time_of,
)
from megamask.plan.workload import Workload
from megamask.weights import mapping
from megamask.weights.family import Architecture, Names
from megamask.weights.mapping import expected_tensors
from megamask.weights.rule import Rule
from megamask.weights.shapes import FOLDER, SHAPES, SOURCES, read_shape
from megamask.weights.tensor_rules import tensor_rules

PAPER = ("learn.preset=maskllm", "learn.micro_batch=1", "data.seq_length=4096")
H100 = GPUS["h100"]
WEIGHTS_7B = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)


def plan(*settings: str, model: str = "llama2-7b", dp: int = 1) -> Workload:
    return Workload(load_config(None, [*PAPER, *settings]), read_shape(model), dp).check()


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        ("llama2-7b", 6.476),
        ("llama2-13b", 12.688),
        ("llama2-70b", 68.451),
        ("llama3-8b", 6.979),
        ("llama3-70b", 68.451),
        ("smollm2-135m", 0.1062),
    ],
)
def test_prunable_weights(model: str, billions: float) -> None:
    """The published sizes without embedding, head (twice the vocabulary but for SmolLM2) and
    norms.
    """
    assert plan("parallel.tp=1", model=model).all_masked_weights == pytest.approx(
        billions * 1e9, rel=5e-4
    )


# Weights in billions as the model cards or papers state them; Gemma 3's without the vision tower.
# Nemotron-4's is the paper's 3.2 of the embeddings and 12.5 of the rest. NVIDIA's GPT-2B-001 is
# called "2B" alone: by hand, 2 x 256,000 x 2,048 + 24 x (4 x 2,048^2 + 3 x 2,048 x 5,440). The 843M
# is the name that MaskLLM's paper gives.
PUBLISHED = {
    "llama2-7b": 6.74,
    "llama2-13b": 13.02,
    "llama2-70b": 68.98,
    "llama3-8b": 8.03,
    "mistral-7b": 7.24,
    "nemotron-4-15b": 15.6,
    "gpt3-2b": 2.25,
    "gpt3-843m": 0.843,
    "qwen2.5-0.5b": 0.49,
    "qwen2.5-1.5b": 1.54,
    "qwen2.5-3b": 3.09,
    "qwen2.5-7b": 7.61,
    "qwen2.5-14b": 14.7,
    "qwen2.5-32b": 32.5,
    "qwen2.5-72b": 72.7,
    "qwen3-0.6b": 0.6,
    "qwen3-1.7b": 1.7,
    "qwen3-4b": 4.0,
    "qwen3-8b": 8.2,
    "qwen3-14b": 14.8,
    "qwen3-32b": 32.8,
    "gemma-3-270m": 0.268,
    "gemma-3-1b": 1.0,
    "gemma-3-4b": 3.88,
    "gemma-3-12b": 11.77,
    "gemma-3-27b": 27.0,
    "mixtral-8x7b": 46.7,
    "qwen1.5-moe-a2.7b": 14.3,
    "qwen3-30b-a3b": 30.5,
}


@pytest.mark.parametrize(("name", "billions"), PUBLISHED.items())
def test_shapes_have_the_published_numbers_of_weights(name: str, billions: float) -> None:
    arch = read_shape(name)
    weights = sum(math.prod(shape) for shape in expected_tensors(arch).values())
    assert weights / 1e9 == pytest.approx(billions, rel=0.02)
    assert weights / 1e9 != pytest.approx(1.05 * billions, rel=0.02)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("gpt3")])
def test_a_shape_of_the_paper_says_where_each_number_comes_from(name: str) -> None:
    values = json.loads((FOLDER / f"{name}.json").read_text())
    sources = values.pop(SOURCES)
    assert values.keys() == sources.keys() and all(sources.values())
    arch = read_shape(name)  # the paper's numbers
    assert (arch.num_layers, arch.heads, arch.max_positions) == (24, 16, 4096)
    assert arch.hidden == {"gpt3-2b": 2048, "gpt3-843m": 1024}[name]
    assert arch.gated and arch.activation == "silu"
    weights = sum(math.prod(shape) for shape in expected_tensors(arch).values())
    if "not published" in sources["intermediate_size"]:  # it follows from the size in the name
        step = 16 * 3 * arch.hidden * arch.num_layers
        assert abs(weights - 843e6) == min(abs(weights + more - 843e6) for more in (-step, 0, step))


def test_a_feed_forward_part_without_a_gate_is_planned_as_such() -> None:
    """Nemotron-4 by hand, TP 8: inputs of the linears, q/k/v, rotated q and k, and F once more."""
    config = load_config(None, ["parallel.tp=8", "parallel.recompute=mlp", *PAPER])
    work = Workload(config, read_shape("nemotron-4-15b")).check()
    q, k, f, h = 6144 / 8, 1024 / 8, 24576 / 8, 6144
    numbers = 2 * h + (q + f) + (q + 2 * k) + (q + k) + f
    per_token = 2 * numbers + 8 * h + 4 * 48 / 8
    assert layer_activations(work, 0, H100) == work.tokens * per_token + 4 * 4096 * 128 * 2
    assert recomputed_activations(work, 0, H100) == work.tokens * 2 * 2 * f
    gated = replace(work, arch=replace(work.arch, gated=True))
    assert memory_of(gated, GPUS["h100"]).total > memory_of(work, GPUS["h100"]).total
    assert time_of(gated, GPUS["h100"]).seconds > time_of(work, GPUS["h100"]).seconds


def test_a_token_is_computed_by_some_of_the_experts() -> None:
    """Mixtral's card: 12.9 billion active weights of 46.7; Qwen3's: 3.3 of 30.5. Memory holds the
    state of all masks, and the arithmetic is that of the experts of a token.
    """
    for name, active in (("mixtral-8x7b", 12.9e9), ("qwen3-30b-a3b", 3.3e9)):
        work = plan("parallel.tp=4", model=name)
        outside = 2 * work.arch.vocab * work.arch.hidden
        assert flops_per_token(work)[MATMULS] / 6 + outside == pytest.approx(active, rel=0.02)
        assert work.all_masked_weights > 3 * flops_per_token(work)[MATMULS] / 6
    mixtral = plan("parallel.tp=4", "parallel.recompute=mlp", model="mixtral-8x7b")
    q, k, f, h = 4096 / 4, 1024 / 4, 2 * 14336 / 4, 4096
    numbers = h + 2 * 2 * h + (q + f) + (q + 2 * k) + (q + k) + 2 * f
    per_token = 2 * numbers + 4 * 2 * 2 * h / 2 + 4 * 32 / 4
    assert layer_activations(mixtral, 0, H100) == mixtral.tokens * per_token + 4 * 4096 * 128 * 2
    assert time_of(mixtral, GPUS["h100"]).seconds > 0


@pytest.mark.parametrize("split", ["false", "true"])
def test_recomputed_experts_keep_the_input_of_a_layer_alone(split: str) -> None:
    """Qwen1.5-MoE with every second layer dense, TP 2: what is saved beside a layer without a
    feed-forward part is the input of that part, H or a rank's share of it, in both kinds of layers.
    """
    settings = ["parallel.tp=2", f"parallel.sequence_parallel={split}"]
    whole, work = (
        plan(*settings, f"parallel.recompute={kind}", model="qwen1.5-moe-a2.7b")
        for kind in ("false", "mlp")
    )
    layers = tuple(
        replace(work.arch.layer(index), experts=index % 2 == 1)
        for index in range(work.arch.num_layers)
    )
    whole, work = (replace(one, arch=replace(one.arch, layers=layers)) for one in (whole, work))
    dense, sparse = (layer_activations(work, index, H100) for index in (0, 1))
    assert sparse > dense > 0
    kept = [
        layer_activations(work, n, H100) - recomputed_activations(work, n, H100) for n in (0, 1)
    ]
    assert kept[0] == pytest.approx(kept[1], rel=1e-12)  # sums of floats, about 1e8 bytes
    half = work.arch.num_layers / 2
    assert saved_activations(whole, H100) == pytest.approx(half * (dense + sparse), rel=1e-12)
    assert saved_activations(work, H100) == pytest.approx(2 * half * kept[0], rel=1e-12)
    copies = 2 * work.arch.hidden * (2 * 4 + 2)  # of 4 experts and the one of every token
    assert recomputed_activations(work, 1, H100) > work.tokens * (copies - 2 * work.arch.hidden)


def test_every_shape_is_read() -> None:
    assert set(SHAPES) == {"toy", "smollm2-135m", "llama3-70b", *PUBLISHED}
    with pytest.raises(ConfigError, match="llama2-7b"):
        read_shape("llama9")


def test_flops_of_a_token() -> None:
    flops = flops_per_token(plan())
    assert flops[MATMULS] == 6 * 6_476_005_376
    assert (
        flops[HEAD] == 4 * 32000 * 4096
    )  # forward and gradient at the hidden states: the head is frozen
    assert flops[ATTENTION] == 6 * 32 * 4096 * 4096
    assert sum(flops.values()) == pytest.approx(42.6e9, rel=1e-3)


def test_a_linear_kept_dense_has_no_weight_gradient() -> None:
    layer = WEIGHTS_7B / 32
    assert (
        flops_per_token(plan("model.exclude=[model.layers.31.*]"))[MATMULS]
        == 31 * 6 * layer + 4 * layer
    )


def test_the_paper_s_run() -> None:
    """2,000 steps x 256 x 4,096 tokens took 1,280 A100 hours: 6 % of the peak. Every A100 plan of
    the same run is several times shorter.
    """
    work = plan("parallel.tp=8", dp=8)
    assert work.config.learn.steps * work.tokens_a_step == 2_097_152_000
    floor = 2_097_152_000 * sum(flops_per_token(work).values()) / 312e12 / 3600
    assert floor == pytest.approx(79.5, rel=5e-3) and floor / 1280 == pytest.approx(0.062, abs=1e-3)
    hours = time_of(work, GPUS["a100"]).gpu_hours(2000)
    assert floor < hours < 1280 / 3
    assert time_of(work, GPUS["a100"]).mfu == pytest.approx(floor / hours)


def test_seconds_by_hand() -> None:
    work, gpu = plan("parallel.tp=8", dp=8), GPUS["h100"]
    parts = time_of(work, gpu).parts
    local, micro_batches = WEIGHTS_7B / 8, 256 / 8
    matmul = 989e12 * 0.80 * 0.81
    assert parts[MATMULS] == pytest.approx(micro_batches * 6 * local * 4096 / matmul)
    rate = 3.35e12 * 0.87
    assert parts[SAMPLING_BACKWARD] == pytest.approx(
        micro_batches * local * (6 + 2 + 2 + 6 + 6) / rate
    )  # logits, W, dW, gradients both ways
    assert parts[OPTIMIZER] == pytest.approx(local * (2 * 6 + 2 * 12 + 3 * 6) / rate)
    hidden = 4096 * 4096 * 2
    assert parts[TP_LINKS] == pytest.approx(
        micro_batches * (4 * 32 + 1) * hidden * 2 * 7 / 8 / (450e9 * 0.75)
    )
    assert parts[DP_LINKS] == pytest.approx(
        local * 6 * 2 * 7 / 8 / (50e9 * 0.75)
    )  # 64 GPUs: between nodes


def test_draws_without_noise_take_less_arithmetic() -> None:
    slow = replace(GPUS["h200"], group_seconds=(1e-9, 2e-9))
    loud, half, quiet = (
        time_of(plan(f"learn.sampling.noise={noise}"), slow).parts for noise in (1, 0.5, 0)
    )
    assert half == loud
    for part in (SAMPLING_FORWARD, SAMPLING_BACKWARD):
        assert quiet[part] == pytest.approx(QUIET * loud[part])


def test_one_draw_a_step_takes_the_sampling_out_of_the_micro_batches() -> None:
    often, once = (
        time_of(plan(), GPUS["h200"]),
        time_of(plan("learn.sampling.draws=step"), GPUS["h200"]),
    )
    assert (
        once.parts[SAMPLING_BACKWARD] < often.parts[SAMPLING_BACKWARD] / 2
        and once.seconds < often.seconds
    )
    # The matmuls of 256 micro-batches read and write fp32 sums in the place of writing bf16, and
    # hide half of it.
    adding = 256 * WEIGHTS_7B * 0.48 * (4 + 4 - 2) / (4.8e12 * 0.87)
    backward = often.parts[SAMPLING_BACKWARD] / 256
    assert once.parts[SAMPLING_BACKWARD] == pytest.approx(backward + adding)
    lean = time_of(
        plan("learn.sampling.draws=step", "learn.state.grads=bf16"), GPUS["h200"]
    )  # sums in bf16 are passes of their own
    assert lean.parts[SAMPLING_BACKWARD] > once.parts[SAMPLING_BACKWARD]


def test_masks_that_micro_batches_share_take_as_many_samplings() -> None:
    """At DP 8, 16 of the 256 micro-batches share a mask, 2 of the 32 of a replica."""
    work = plan("learn.sampling.draws=16", dp=8)
    often, shared, once = (
        time_of(one, GPUS["h200"]).parts
        for one in (plan(dp=8), work, plan("learn.sampling.draws=step", dp=8))
    )
    assert work.mask_uses == [2] * 16
    assert shared[SAMPLING_FORWARD] == pytest.approx(often[SAMPLING_FORWARD] / 2)
    assert shared[SAMPLING_FORWARD] == pytest.approx(16 * once[SAMPLING_FORWARD])
    adding = 32 * WEIGHTS_7B * 0.48 * (4 + 4 - 2) / (4.8e12 * 0.87)
    assert shared[SAMPLING_BACKWARD] == pytest.approx(often[SAMPLING_BACKWARD] / 2 + adding)
    memory = memory_of(work, GPUS["h200"])
    assert memory.state[state.STEP_GRADIENTS] == 4 * WEIGHTS_7B
    alone = plan("learn.sampling.draws=8", dp=8)  # each replica uses a mask once
    assert alone.mask_uses == [1] * 32
    assert state.STEP_GRADIENTS not in memory_of(alone, GPUS["h200"]).state


def test_plain_pytorch_samples_slower_and_in_more_memory() -> None:
    fused, eager = plan("learn.sampling.backend=triton"), plan("learn.sampling.backend=torch")
    assert (
        time_of(eager, GPUS["h100"]).parts[SAMPLING_BACKWARD]
        == 5 * time_of(fused, GPUS["h100"]).parts[SAMPLING_BACKWARD]
    )
    more = memory_of(eager, GPUS["h100"]).total - memory_of(fused, GPUS["h100"]).total
    assert more == pytest.approx(
        32 * 1.5 * 2 * 4096 * 11008, rel=0.1
    )  # of the largest linear, gate and up together


def test_a_gpu_that_is_faster_than_its_host_waits() -> None:
    small = Workload(load_config(None, ["data.seq_length=256"]), read_shape("smollm2-135m")).check()
    assert time_of(small, GPUS["h100"]).seconds > 30 * 1e-3  # 30 layers


def test_activations_by_hand() -> None:
    """Per token, H = Q = K: two norms in fp32, and bf16 of H + Q + H + F linear inputs, 3 H fused
    q/k/v, 2 H rotated, 2 F of the gate, or 4 in separate passes.
    """
    numbers = 2 * 4096 + 4096 + 11008 + 3 * 4096 + 2 * 4096 + 2 * 11008
    rotary = 4 * 4096 * 128 * 2
    assert layer_activations(plan(), 0, H100) == 4096 * (2 * numbers + 8 * 4096 + 4 * 32) + rotary
    shared = (
        layer_activations(plan("parallel.tp=8", "parallel.sequence_parallel=true"), 0, H100)
        - rotary
    )
    assert shared == pytest.approx(
        (layer_activations(plan(), 0, H100) - rotary) / 8
    )  # nothing is held twice


def test_memory_by_hand() -> None:
    memory = memory_of(plan("parallel.tp=8", dp=8), GPUS["a100"])
    local = WEIGHTS_7B / 8
    assert memory.state[state.WEIGHTS] == 2 * local and memory.state[state.LOGITS] == 6 * local
    assert memory.state[state.MOMENTS] == 12 * local and memory.state[state.HARD_CODES] == local / 2
    assert memory.state[OTHER_WEIGHTS] == 2 * (2 * 32000 * 4096 / 8 + 65 * 4096)
    assert memory.step[state.KEPT] == 2 * local
    assert memory.total == sum(memory.parts.values()) and memory.parts[ALLOWANCE] > 1.5 * GIB


def test_recomputation_holds_one_layer() -> None:
    plain, thrifty = (
        memory_of(plan(), GPUS["h200"]),
        memory_of(plan("parallel.recompute=true"), GPUS["h200"]),
    )
    assert thrifty.step[ACTIVATIONS] < plain.step[ACTIVATIONS] / 8
    assert thrifty.step[state.KEPT] == 0 < plain.step[state.KEPT]


def test_recomputation_of_the_mlp_by_hand() -> None:
    """All layers keep what they keep but 3 F a token, and their four attention matrices; one MLP is
    there at the busiest moment.
    """
    work, gpu = plan("parallel.recompute=mlp"), GPUS["h100"]
    wide, mlp = 4096 * 2 * 3 * 11008, 3 * 4096 * 11008
    memory = memory_of(work, gpu)
    assert memory.step[ACTIVATIONS] == 32 * (layer_activations(work, 0, H100) - wide) + wide
    assert (
        memory.step[state.KEPT] == pytest.approx(2 * 32 * 4 * 4096 * 4096)
        and memory.step[ONE_LAYER] == 2 * mlp
    )
    assert 0.58 < memory.step[ACTIVATIONS] / memory_of(plan(), gpu).step[ACTIVATIONS] < 0.64
    apart, half = (
        plan("parallel.fused=false"),
        plan("parallel.fused=false", "parallel.recompute=mlp"),
    )
    ratio = [memory_of(one, gpu).step[ACTIVATIONS] for one in (half, apart)]
    assert 0.45 < ratio[0] / ratio[1] < 0.55
    plain, some, whole = (
        time_of(plan(*more), gpu).parts
        for more in ([], ["parallel.recompute=mlp"], ["parallel.recompute=true"])
    )
    rate = 3.35e12 * 0.87
    assert some[RECOMPUTE] == pytest.approx(
        256 * 32 * 4096 * (2 * mlp / (989e12 * 0.80 * 0.81) + 6 * 11008 / rate)
    )
    assert 0.5 < some[RECOMPUTE] / whole[RECOMPUTE] < 0.6
    share = mlp / (mlp + 4 * 4096 * 4096)
    assert some[SAMPLING_FORWARD] == pytest.approx(plain[SAMPLING_FORWARD] * (1 + share))
    assert whole[SAMPLING_FORWARD] == pytest.approx(plain[SAMPLING_FORWARD] * 2)


def test_recomputation_repeats_all_reduces() -> None:
    policies = ("false", "mlp", "true")
    once, some, whole = (
        time_of(plan("parallel.tp=8", f"parallel.recompute={one}"), GPUS["h100"]).parts[TP_LINKS]
        for one in policies
    )
    assert some / once == pytest.approx(
        (5 * 32 + 1) / (4 * 32 + 1)
    ) and whole / once == pytest.approx((6 * 32 + 1) / (4 * 32 + 1))


def test_a_recomputed_linear_without_a_mask_is_not_drawn_again() -> None:
    work = plan("parallel.recompute=mlp", "model.exclude=['*.mlp.*']")
    assert work.recomputed_share == 0 and work.recomputed_weights == 32 * 3 * 4096 * 11008
    assert memory_of(work, GPUS["h200"]).step[state.KEPT] == 2 * work.masked_weights


def test_the_vocabulary_loss_never_holds_all_logits() -> None:
    memory = memory_of(plan(model="llama3-8b"), GPUS["h200"])
    assert 0 < memory.step[LOSS] < 4096 * 128256 * 4 / 3


def test_what_fits_is_not_refused() -> None:
    check_fits(
        load_config(None, [*PAPER, "parallel.tp=8"]), read_shape("llama2-7b"), GPUS["a100"], dp=8
    )


def test_what_does_not_fit_is_refused_with_what_does() -> None:
    config = load_config(None, [*PAPER, "parallel.tp=1"])
    with pytest.raises(
        ConfigError, match=r"memory of a rank = '\d+\.\d GiB': more than the 79.2 GiB of H100 80GB"
    ) as refused:
        check_fits(config, read_shape("llama2-7b"), GPUS["h100"])
    assert "parallel.recompute=mlp learn.memory=leanest (" in str(refused.value)
    named = Workload(
        load_config(None, [*PAPER, "parallel.recompute=mlp", "learn.memory=leanest"]),
        read_shape("llama2-7b"),
    )
    assert memory_of(named, GPUS["h100"]).total <= GPUS["h100"].capacity


def test_the_search_of_what_fits_makes_each_table_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaMA-2-70B at TP 2 tries dozens of settings, of which each made six tables."""
    made: list[int] = []

    def counted(arch: Architecture, names: Names, rows: int) -> list[Rule]:
        made.append(rows)
        return tensor_rules(arch, names, rows)

    monkeypatch.setattr(mapping, "tensor_rules", counted)
    mapping._table.cache_clear()
    with pytest.raises(ConfigError, match="parallel.tp=8 learn.memory=leanest"):
        check_fits(
            plan("parallel.tp=2", model="llama2-70b", dp=8).config,
            read_shape("llama2-70b"),
            GPUS["h200"],
            8,
        )
    assert made == [32000]  # rows of the vocabulary: 2, 4 and 8 divide it


def test_a_device_that_is_half_full_is_refused_before_loading() -> None:
    config, arch = load_config(None, [*PAPER, "parallel.tp=8"]), read_shape("llama2-7b")
    check_free(config, arch, 8, 40 * GIB, "NVIDIA X")
    with pytest.raises(
        ConfigError, match="of NVIDIA X .free now.*learn.optimizer.distributed=true [(]"
    ):
        check_free(config, arch, 8, 29 * GIB, "NVIDIA X")


def test_a_distributed_optimizer_divides_moments_and_their_update() -> None:
    """128 linears of four sizes on 8 replicas come out even."""
    one, gpu = plan("parallel.tp=8", dp=8), GPUS["h100"]
    parts = plan("parallel.tp=8", "learn.optimizer.distributed=true", dp=8)
    assert one.updated_share == 1 and parts.updated_share == pytest.approx(1 / 8, rel=0.01)
    assert parts.state[MOMENTS] == one.state[MOMENTS] * parts.updated_share
    assert (
        time_of(parts, gpu).parts[OPTIMIZER] < 0.3 * time_of(one, gpu).parts[OPTIMIZER]
    )  # all gradients are cleared on each replica
    assert time_of(parts, gpu).parts[DP_LINKS] == pytest.approx(
        time_of(one, gpu).parts[DP_LINKS]
    )  # fp32 logits and gradients
    assert (
        memory_of(parts, gpu).total
        < memory_of(one, gpu).total - 7 / 8 * 12 * one.masked_weights + 2**20
    )
    with pytest.raises(
        ConfigError, match="learn.optimizer.distributed = True: .* here 256 and 128"
    ):
        plan("learn.optimizer.distributed=true", dp=256)


def test_less_memory_asks_for_more() -> None:
    """From settings, to more GPUs a layer, to a larger GPU, to nothing."""
    work = plan()

    def fix(gib: float) -> str:
        return advice(work, replace(GPUS["a100-40"], capacity=gib * GIB), in_plan=True)

    assert "learn.state.masked_weight=regenerate (" in fix(198)
    assert "parallel.recompute=mlp (" in fix(184) and "parallel.recompute=true (" in fix(175)
    assert "parallel.tp=2" in fix(39) and "leanest" in fix(39)
    assert "--gpu a100 " in fix(5)
    assert "Nothing in reach" in advice(
        plan("pattern=4:8", model="llama3-70b"), GPUS["h200"], in_plan=True
    )  # 8.75 logits a weight


def test_other_verbs_name_no_option_of_plan() -> None:
    """``learn --dp 2`` is refused."""
    small, two = replace(GPUS["a100-40"], capacity=5 * GIB), plan(dp=2)
    fix = advice(plan(), small, in_plan=False)
    assert "--" not in fix and "with GPUs like A100 80GB (" in fix
    by_layout = [one for one in remedies(two, small) if one.options and "--dp" in one.options[0]]
    assert by_layout and all("as many processes as before" in one.words[0] for one in by_layout)


def test_the_ranks_of_a_machine_share_it() -> None:
    whole = device_named("cpu")
    part = whole.shared_by(3)
    assert (part.capacity, part.flops) == (whole.capacity / 3, whole.flops / 3)
    assert part.group_seconds == tuple(3 * one for one in whole.group_seconds)
    work = plan("data.seq_length=256", model="smollm2-135m")
    assert time_of(work, part).seconds > 2 * time_of(work, whole).seconds


def test_remedies_only_name_what_can_work() -> None:
    """9 heads and 3 KV heads never split over 2, 4 or 8."""
    work = Workload(load_config(None, ["data.seq_length=256"]), read_shape("smollm2-135m")).check()
    assert all(not one.fits for one in remedies(work, GPUS["a100"]) if one.work.tp > 1)


def test_a_memory_that_the_recipe_overrules_is_not_proposed() -> None:
    assert memory_applies(load_config(None, []), "lean")
    assert not memory_applies(load_config(None, ["learn.memory=lean"]), "lean")
    assert memory_applies(load_config(None, ["learn.memory=lean"]), "leanest")
    assert not memory_applies(load_config(None, ["learn.optimizer.kind=adamw"]), "leanest")
    assert not memory_applies(load_config(None, ["learn.state.logits=fp32"]), "lean")
    assert memory_applies(load_config(None, ["learn.optimizer.kind=adamw"]), "lean")
    assert memory_applies(load_config(None, ["learn.optimizer.lr=1e-3"]), "lean")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["parallel.tp=3"], "parallel.tp = 3"),
        (["parallel.sequence_parallel=true"], "needs parallel.tp > 1"),
        (["learn.global_batch=7", "learn.micro_batch=2"], "learn.global_batch"),
        (["pattern=2:3"], "pattern = '2:3'"),
        (["data.seq_length=8192"], "data.seq_length = 8192: at most 4,096"),
        (["evaluate.window=8192"], "evaluate.window = 8192: at most 4,096"),
        (["learn.method=subsets"], "learn.method = 'subsets'.*Did you mean subset"),
    ],
)
def test_what_no_memory_mends(settings: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        plan(*settings)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_dense_last_layer_hides_nothing(backend: str) -> None:
    """All layers are alike, so it does not matter which is kept dense."""
    words = ("parallel.recompute=true", "learn.memory=lean", f"learn.sampling.backend={backend}")
    first, last = (
        memory_of(plan(*words, f"model.exclude=[model.layers.{number}.*]"), GPUS["h100"]).step
        for number in (0, 31)
    )
    assert first == last and first[ONE_LAYER] > 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["learn.memory=lean"], "learn.state.logits = 'bf16'"),
        (["learn.maskpro.masks=8", "learn.micro_batch=4"], "a divisor of the step's micro-batches"),
    ],
)
def test_what_a_method_refuses_is_not_planned(words: list[str], says: str) -> None:
    maskpro = ["learn.preset=maskpro", "learn.global_batch=8"]
    with pytest.raises(ConfigError, match=says):
        plan(*maskpro, *words)
    kind = "learn.optimizer.kind=adamw8bit"  # needs a compiler where it learns, not here
    assert plan(kind).method.name == "categorical"


def test_a_teacher_costs_a_forward_pass_and_its_hidden_states() -> None:
    """2 FLOPs a weight and token, and what is not matmuls; 4096 x 4096 numbers of 2 bytes, a chunk
    of 2048 tokens' logits, and fp32 blocks of half a chunk: three, or two of the top tokens alone,
    in the place of one of a whole chunk.
    """
    text, both = plan("parallel.tp=1"), plan("parallel.tp=1", "learn.distillation.share=0.5")
    gpu = GPUS["h100"]
    before, after = time_of(text, gpu).parts, time_of(both, gpu).parts
    assert after == {**before, TEACHER: after[TEACHER]}
    matmuls = 256 * 4096 * 2 * (WEIGHTS_7B + 32000 * 4096) / (gpu.flops * gpu.matmul)
    assert matmuls < after[TEACHER] < 2.5 * matmuls
    assert after[TEACHER] < sum(before.values()) / 2
    student, with_teacher = (memory_of(one, gpu).step[LOSS] for one in (text, both))
    more = 4096 * 4096 * 2 + 2048 * 32000 * 2
    assert with_teacher - student == more + 1024 * 32000 * 4
    top = plan("parallel.tp=1", "learn.distillation.share=0.5", "learn.distillation.top_k=16")
    assert memory_of(top, gpu).step[LOSS] - student == more
    # the layers alone: no logits of the teacher; 72 bytes a number of 32 layers' states
    layers = plan("parallel.tp=1", "learn.distillation.hidden=1")
    found = time_of(layers, gpu).parts
    compared = 256 * 4096 * 72 * 4096 * 32 / (gpu.bandwidth * gpu.copy)
    body = 256 * 4096 * 2 * WEIGHTS_7B / (gpu.flops * gpu.matmul)
    assert found == {**before, TEACHER: found[TEACHER]}
    assert compared + body < found[TEACHER] < after[TEACHER] + compared
    step = memory_of(layers, gpu).step
    assert step == {**memory_of(text, gpu).step, DENSE_LAYERS: 32 * 4096 * 4096 * 2}
