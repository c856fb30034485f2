"""Every moment of a run against sums done by hand for LLaMA-2-7B."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megamask.learn.method import (
    GRADIENTS,
    HARD_CODES,
    KEPT,
    LOGITS,
    MOMENTS,
    WEIGHTS,
)
from megamask.plan.hardware import GPUS, device_named
from megamask.plan.memory import (
    ACTIVATIONS,
    BESIDE,
    COPIES,
    EVALUATED,
    EVALUATION,
    LAYER,
    LOSS,
    MASK_FILE,
    NEW_HARD_CODES,
    ONE_LAYER,
    ONE_MASK,
    OTHER_WEIGHTS,
    RESUME,
    SNAPSHOT,
    STEP,
    memory_of,
)
from megamask.plan.plan_tables import memory_table
from megamask.plan.saved_tensors import layer_activations
from tests.unit.plan.test_plan import WEIGHTS_7B, plan


def test_every_moment_by_hand() -> None:
    """Lean, subset, one rank: 4 bytes of moments and 2 of a logit a weight in a snapshot."""
    settings = ["learn.memory=lean", "parallel.recompute=true", "evaluate.micro_batch=1"]
    work = plan("learn.method=subset", *settings)
    memory = memory_of(work, GPUS["h100"])
    largest, block = 2 * 4096 * 11008, 1 << 22
    evaluation = memory.moments[EVALUATION]
    assert evaluation[ONE_LAYER] == 2 * largest  # one masked weight, not all
    assert evaluation[ONE_MASK] == largest / 4 + block * (1 + 1 + 2)
    assert work.saved_bytes == 6 * WEIGHTS_7B
    assert memory.moments[SNAPSHOT][COPIES] == memory.moments[RESUME][COPIES] == 0
    assert memory.moments[MASK_FILE] == {ONE_MASK: largest / 4}
    on_cpu = memory_of(work, device_named("cpu")).moments[SNAPSHOT]
    assert on_cpu[COPIES] == 6 * 32 * largest
    beside = memory_of(work, device_named("cpu")).moments[BESIDE]
    assert beside[COPIES] == on_cpu[COPIES] + 6 * WEIGHTS_7B  # pages that a step overwrites
    assert BESIDE not in memory.moments  # CUDA tensors are copied to the host first
    totals = {moment: memory.total_at(moment) for moment in memory.moments}
    assert memory.busiest == STEP and memory.total == max(totals.values()) == totals[STEP]


def test_the_busiest_moment_is_named_and_decides() -> None:
    """Long windows make an evaluation larger than a step; 8-bit moments grow on the host, in a
    snapshot, and are converted linear by linear.
    """
    settings = ["learn.method=subset", "learn.memory=leanest", "parallel.recompute=true"]
    small = [*settings, "data.seq_length=128"]
    long = plan(*small, "evaluate.window=4096", "evaluate.micro_batch=64")
    memory = memory_of(long, GPUS["h100"])
    assert memory.busiest == EVALUATION
    assert memory.total > sum(memory.state.values()) + sum(memory.step.values())
    assert "**sum: an evaluation**" in "\n".join(memory_table(memory))
    short, largest = plan(*small), 2 * 4096 * 11008
    assert memory_of(short, GPUS["h100"]).moments[SNAPSHOT][COPIES] == 12 * largest
    on_cpu = memory_of(short, device_named("cpu")).moments[SNAPSHOT]
    assert on_cpu[COPIES] == 2 * WEIGHTS_7B + 4 * 32 * largest


def test_capped_scores_and_logits_by_hand() -> None:
    """LLaMA-2-7B with Gemma 2's caps: 32 heads score 4,096 x 4,096 pairs of a window, and S x S in
    a step.
    """
    settings = ["learn.method=subset", "parallel.recompute=true", "evaluate.micro_batch=2"]
    free = plan(*settings, "evaluate.window=4096")
    capped = replace(free, arch=replace(free.arch, attention_cap=50.0, logit_cap=30.0))
    evaluation = memory_of(capped, GPUS["h100"]).moments[EVALUATION]
    scores, hidden = 2 * 32 * 4096 * 4096, 2 * 4096 * 4096 * 2
    # bf16, and fp32 before and after the softmax; q, k and v as wide as the hidden states
    assert evaluation == {EVALUATED: 2 * hidden, LAYER: scores * (2 + 4 + 4) + 7 * hidden}
    assert sum(memory_of(free, GPUS["h100"]).moments[EVALUATION].values()) < scores
    # A step: tanh's output, softmax's and two gradients of it, less the feed-forward part of the
    # layer, whose three tensors are gone.
    step, wide = memory_of(capped, GPUS["h100"]).step, 4096 * 11008 * 2
    assert step[LAYER] == 2 * hidden / 2 + scores / 2 * (2 + 4 + 4 + 4 - 8) - 3 * wide
    assert step[ACTIVATIONS] > layer_activations(capped, 0, GPUS["h100"]) > scores / 2 * 8
    # The slope of the logits: a second chunk of 512 x 128,256 in bf16, beside the fp32 block.
    words = plan(model="llama3-8b")
    capped = replace(words, arch=replace(words.arch, logit_cap=30.0))
    without, sloped = (memory_of(one, GPUS["h200"]) for one in (words, capped))
    assert sloped.step[LOSS] - without.step[LOSS] == 512 * 128256 * 2
    assert sloped.moments[EVALUATION] == without.moments[EVALUATION]  # no slope there


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("dp", [1, 8])
def test_every_moment_of_eight_ranks_by_hand(dp: int, sequence_parallel: bool) -> None:
    """A rank of LLaMA-2-7B at TP 8 has 4 of 32 heads, 1,376 of 11,008 hidden features and 4,000 of
    32,000 words. Residual streams are divided by sequence parallelism alone, and moments by the
    replicas of a distributed optimizer, which deals 128 linears in shares of 16.
    """
    spread = str(sequence_parallel).lower()
    settings = ["parallel.tp=8", f"parallel.sequence_parallel={spread}", "learn.method=subset"]
    divided = f"learn.optimizer.distributed={str(dp > 1).lower()}"
    work = plan(*settings, divided, dp=dp)
    memory = memory_of(work, GPUS["h100"])
    weights, tokens, h, q, f, words = WEIGHTS_7B // 8, 4096, 4096, 512, 1376, 4000
    shard = h // 8 if sequence_parallel else h
    # bf16 weights; logits and their gradients in fp32; two moments; two records of hard masks
    state = {WEIGHTS: 2, LOGITS: 4, GRADIENTS: 4, MOMENTS: 8 / dp, HARD_CODES: 2 / 4}
    for part, size in state.items():
        assert memory.state[part] == size * weights, part
    assert memory.state[OTHER_WEIGHTS] == 2 * (2 * words * h + 65 * h)
    step = memory.step
    assert step[KEPT] == 2 * weights and step[NEW_HARD_CODES] == weights / 4
    # bf16: inputs of q/k/v, output projection, gate/up and down; q/k/v twice; gate and up
    numbers = shard + q + shard + f + 3 * q + 2 * q + 2 * f
    a_token = 2 * numbers + 2 * 4 * shard + 4 * 4  # two norms' inputs and the sums of four heads
    rotary = 4 * tokens * 128 * 2
    assert step[ACTIVATIONS] == 32 * (tokens * a_token + rotary)
    stream, gathered = 2 * tokens * h, 2 * tokens * h * sequence_parallel
    # logits of all 4,096 tokens, in bf16 and fp32, and the hidden states with their gradient
    assert step[LOSS] == words * tokens * (2 + 4) + 2 * stream + gathered
    evaluation = memory.moments[EVALUATION]  # 4 windows of 512 tokens: half of a micro-batch
    if sequence_parallel:  # the loss
        loss = words * tokens / 2 * (2 + 4) + (stream + gathered) / 2
        assert evaluation == {ACTIVATIONS: 0, LOSS: loss}
    else:  # the fold of [gate; up] beside two residual streams, 4 million weights at a time
        mask = 2 * h * f / 4 + (1 << 22) * (1 + 1 + 2)
        assert evaluation == {EVALUATED: stream, ONE_LAYER: 2 * 2 * h * f, ONE_MASK: mask}
    assert memory.moments[SNAPSHOT] == memory.moments[RESUME] == {COPIES: 0}
    # codes of [gate; up] whole, from all ranks and joined
    assert memory.moments[MASK_FILE] == {ONE_MASK: 2 * (2 * h * 8 * f) / 4}
    assert work.saved_bytes == (4 + 8 / dp) * weights
    for moment, working in memory.moments.items():
        held = sum(memory.state.values()) + sum(working.values())
        assert memory.total_at(moment) == held + GPUS["h100"].allowance(sum(working.values()))
