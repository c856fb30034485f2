"""Seconds of a step, by part, from its FLOPs and bytes and from the rates in ``hardware``.

Nothing overlaps in this model: communication, optimizer and sampling are added up. A run that hides
some of them behind arithmetic is faster than its plan.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamask.learn.method import GRADIENTS, LOGITS, MOMENTS
from megamask.plan.hardware import GPUS_A_NODE, LAUNCH_SECONDS, Device
from megamask.plan.passes import (
    elementwise_bytes,
    gated_bytes,
    hidden_match_bytes,
    loss_bytes,
)
from megamask.plan.workload import Workload

MATMULS = "matmuls of the layers"
ATTENTION = "attention"
HEAD = "vocabulary head and loss"
ELEMENTWISE = "norms, rotary, activation, residuals"
RECOMPUTE = "recomputed forward"
TEACHER = "dense teacher of distillation"
SAMPLING_FORWARD = "sampling, forward"
SAMPLING_BACKWARD = "sampling, backward"
OPTIMIZER = "optimizer, clipping, clearing"
TP_LINKS = "tensor parallel communication"
DP_LINKS = "data parallel gradients"
LAUNCHES = "waiting for the host"

# The share of a forward pass's launches that parallel.recompute repeats.
TWICE: dict[bool | str, float] = {False: 0.0, "mlp": 1 / 3, True: 1.0}
# The forward pass's share of a step's work, by part, where it does not depend on the device.
FORWARD = {MATMULS: 1 / 3, ATTENTION: 1 / 3, HEAD: 1 / 2, RECOMPUTE: 0.0}
# Plain PyTorch moves this many times the bytes of one fused pass to sample: about 154 a weight
# against 32 at 2:4.
EAGER = 5.0
# The share of the time to move an fp32 sum of dW that a matmul on an H100 does not hide: 0.089 ms
# of 0.185 for 22016 x 4096 weights.
BESIDE = 0.48
# The share of a CPU's arithmetic that a draw at learn.sampling.noise=0 takes, measured at 2:4.
QUIET = 0.55


@dataclass(frozen=True)
class Time:
    """The seconds of one step.

    Attributes:
        parts: seconds by part.
        tokens: tokens in a global batch.
        gpus: devices of the run.
        model_flops: FLOPs of a step of the whole run, without recomputation.
        peak: FLOP per second of one device.
    """

    parts: dict[str, float]
    tokens: int
    gpus: int
    model_flops: float
    peak: float

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of the whole run."""
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs per second over the peak of all devices."""
        return self.model_flops / (self.seconds * self.gpus * self.peak)

    def gpu_hours(self, steps: int) -> float:
        """GPU-hours of a run of ``steps`` steps, without evaluation and start-up."""
        return self.seconds * steps * self.gpus / 3600


def flops_per_token(work: Workload) -> dict[str, float]:
    """Model FLOPs per token, forward and backward, of the whole model: 2 a weight and pass.

    A masked linear has a forward, a gradient at its input and one at its weight: 6 a weight. A
    frozen one (the head, linears kept dense) has no weight gradient: 4. The embedding is a look-up:
    0. An expert counts with the share of the tokens that it computes. Causal attention sees S / 2
    keys on average: 2 S Q a layer forward, twice that backward.
    """
    arch = work.arch
    masked, dense = (
        sum(linear.whole * linear.share for linear in work.linears if linear.is_masked is kind)
        for kind in (True, False)
    )
    return {
        MATMULS: 6.0 * masked + 4.0 * dense,
        ATTENTION: 6.0 * arch.num_layers * work.config.data.seq_length * arch.heads * arch.head_dim,
        HEAD: 4.0 * arch.vocab * arch.hidden,
    }


def time_of(work: Workload, device: Device) -> Time:
    """Seconds of a step of ``work`` on ``device``."""
    micro, passes = work.accumulations, work.forward_passes
    once = _forward(work, device) if passes else _compute(work, device)
    compute = {part: seconds * micro * max(passes, 1) for part, seconds in once.items()}
    sampling, links = (
        _sampling(work, device),
        {TP_LINKS: micro * _tp_seconds(work, device), DP_LINKS: _dp_seconds(work, device)},
    )
    parts = {**compute, **sampling, OPTIMIZER: _optimizer(work, device), **links}
    if work.config.learn.distillation.needs_dense_model:
        parts[TEACHER] = micro * _teacher(work, device)
    forced = (
        LAUNCH_SECONDS
        * micro
        * work.arch.num_layers
        * (1 + TWICE[work.config.parallel.recompute] / 3)
    )
    parts[LAUNCHES] = (
        0.0 if device.is_cpu else max(0.0, forced - sum(compute.values()) - sum(sampling.values()))
    )
    flops = {
        part: number * (passes * FORWARD[part] if passes else 1)
        for part, number in flops_per_token(work).items()
    }
    model_flops = sum(flops.values()) * work.tokens_a_step
    return Time(parts, work.tokens_a_step, work.tp * work.dp, model_flops, device.flops)


def _forward(work: Workload, device: Device) -> dict[str, float]:
    """Seconds of arithmetic of one micro-batch's forward pass."""
    whole, copying = _compute(work, device), device.bandwidth * device.copy
    numbers = work.tokens * work.arch.num_layers / copying
    moved = elementwise_bytes(work, device).forward + gated_bytes(work, device).forward
    shares = {part: whole[part] * share for part, share in FORWARD.items()}
    return {**shares, ELEMENTWISE: moved * numbers}


def _compute(work: Workload, device: Device) -> dict[str, float]:
    """Seconds of arithmetic of one micro-batch."""
    share = work.tokens / work.tp
    flops = flops_per_token(work)
    matmuls = flops[MATMULS] * share / device.matmul_rate
    attention = flops[ATTENTION] * share / device.attention_rate
    head = flops[HEAD] * share / device.matmul_rate
    numbers = work.tokens * work.arch.num_layers / (device.bandwidth * device.copy)
    gated, elementwise = gated_bytes(work, device), elementwise_bytes(work, device)
    loss = loss_bytes(work, device) * work.tokens / (device.bandwidth * device.copy)
    again = 2.0 * work.recomputed_weights * share / device.matmul_rate
    if work.config.parallel.recompute:
        again += gated.forward * numbers
    if work.config.parallel.recompute is True:
        again += elementwise.forward * numbers + attention / 3
    return {
        MATMULS: matmuls,
        ATTENTION: attention,
        HEAD: head + loss,
        ELEMENTWISE: (sum(elementwise) + sum(gated)) * numbers,
        RECOMPUTE: again,
    }


def _teacher(work: Workload, device: Device) -> float:
    """Seconds of the dense model's forward pass on one micro-batch: half the communication, logits
    of its own where they are compared, and the comparison of the layers.
    """
    forward, copying = {**_forward(work, device), HEAD: 0.0}, device.bandwidth * device.copy
    seconds = sum(forward.values()) + _tp_seconds(work, device) / 2
    if work.config.learn.distillation.share > 0:
        share = work.tokens / work.tp
        seconds += 2.0 * work.arch.vocab * work.arch.hidden * share / device.matmul_rate
        # as many passes as over the student's
        seconds += loss_bytes(work, device) * work.tokens / copying
    if work.config.learn.distillation.hidden > 0:
        seconds += hidden_match_bytes(work) * work.tokens * work.arch.num_layers / copying
    return seconds


def _sampling(work: Workload, device: Device) -> dict[str, float]:
    """Seconds of drawing masks in a step, forward and backward.

    A forward reads logits and weight and writes the masked weight; a backward reads them with dW,
    and reads and writes the gradients. A draw per micro-batch does both each time, and a forward
    again of what is recomputed and again to regenerate; a mask that micro-batches share does both
    once, and dW is added up between them. A GPU's matmuls add to an fp32 sum, and move the sum in
    and out in the place of dW, of which ``BESIDE`` is not hidden.
    """
    config, weights, width, micro = work.config, work.masked_weights, work.width, work.accumulations
    logits, grads = work.state[LOGITS], work.state[GRADIENTS]
    slower = EAGER if config.learn.sampling.backend == "torch" else 1.0
    rate, numbers = (
        device.bandwidth * device.copy / slower,
        slower * weights * work.mean(work.logits_of),
    )
    if config.learn.sampling.noise == 0:
        numbers *= QUIET
    forward = max(weights * (logits + 2 * width) / rate, numbers * device.group_seconds[0])
    backward = max(
        weights * (logits + 2 * width + 2 * grads) / rate, numbers * device.group_seconds[1]
    )
    if work.forward_passes:  # and for every mask of the step once more, with its score
        return {
            SAMPLING_FORWARD: micro * work.forward_passes * forward,
            SAMPLING_BACKWARD: config.learn.maskpro.masks * backward,
        }
    if config.learn.sampling.span > 1:
        in_matmul = not device.is_cpu and config.learn.state.grads == "fp32"
        moved = BESIDE * (8 - width) if in_matmul else width + 8
        draws, added = len(work.mask_uses), sum(used for used in work.mask_uses if used > 1)
        adding = weights * moved / rate * added
        return {SAMPLING_FORWARD: draws * forward, SAMPLING_BACKWARD: draws * backward + adding}
    again = work.recomputed_share + int(config.learn.state.masked_weight == "regenerate")
    return {SAMPLING_FORWARD: micro * forward * (1 + again), SAMPLING_BACKWARD: micro * backward}


def _optimizer(work: Workload, device: Device) -> float:
    """Seconds of the update: logits and moments are read and written; gradients are read for the
    norm, read again for the update, and cleared.
    """
    if work.forward_passes:
        return 0.0
    state = work.state  # the moments of this replica
    moved = (
        work.updated_share * (2 * state[LOGITS] + 2 * state[GRADIENTS])
        + 2 * state[MOMENTS]
        + state[GRADIENTS]
    )
    return work.masked_weights * moved / (device.bandwidth * device.copy)


def _tp_seconds(work: Workload, device: Device) -> float:
    """Seconds of the all-reduces (or gathers and scatters) of hidden states in one micro-batch: two
    a layer and pass, and one for the loss.

    Recomputation repeats both of a forward pass, that of the feed-forward part one. Sequence
    parallel gathers the input of the column-parallel linears once more for their weight gradients.
    """
    tp, config = work.tp, work.config
    if tp == 1:
        return 0.0
    again = {False: 0, "mlp": 1, True: 2}[config.parallel.recompute]
    passes = 2 * work.forward_passes or 4 + again + int(config.parallel.sequence_parallel)
    hidden = work.tokens * work.arch.hidden * work.width
    return (
        (passes * work.arch.num_layers + 1) * hidden * _ring(tp) / (_link(tp, device) * device.link)
    )


def _dp_seconds(work: Workload, device: Device) -> float:
    """Seconds of one all-reduce of the logits' gradients in a step.

    A distributed optimizer scatters the gradients and gathers the logits instead, half an
    all-reduce each.
    """
    if work.dp == 1 or work.forward_passes:
        return 0.0
    state, distributed = work.state, work.config.learn.optimizer.distributed
    size = (state[GRADIENTS] + state[LOGITS]) / 2 if distributed else state[GRADIENTS]
    return (
        work.masked_weights
        * size
        * _ring(work.dp)
        / (_link(work.tp * work.dp, device) * device.link)
    )


def _ring(ranks: int) -> float:
    return 2 * (ranks - 1) / ranks


def _link(ranks: int, device: Device) -> float:
    return device.node_link if ranks <= GPUS_A_NODE else device.fabric
