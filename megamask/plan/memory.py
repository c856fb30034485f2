"""Peak memory of one rank, by part, at every moment of a run: a learning step, an evaluation, a
snapshot, a resume, and the writing of a mask.

A part is state, saved activations, or the working memory of the busiest point of a moment.

A test compares the sum with the numbers of PyTorch's allocator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megamask.learn.method import KEPT, STEP_GRADIENTS
from megamask.model.vocabulary import VocabularyShard, block_size, chunk_size
from megamask.parallel.masked_linear import BLOCK
from megamask.plan.capped_attention import in_attention, within_backward
from megamask.plan.hardware import Device
from megamask.plan.passes import fuses_activation
from megamask.plan.saved_tensors import (
    kept_by_activation,
    most_recomputed,
    saved_activations,
    stream,
)
from megamask.plan.workload import Workload
from megamask.sparsity.pattern import Pattern

PAIR_BYTES = 14.0  # of a weight while a mask of pairs is drawn: at most three and a half tensors
STEP = "a learning step"
EVALUATION = "an evaluation"
SNAPSHOT = "a snapshot"
BESIDE = "a step while a snapshot is written"
RESUME = "a resume from a snapshot"
MASK_FILE = "the writing of a mask"
OTHER_WEIGHTS = "embedding, head, norms, dense linears"
ONE_LAYER = "masked weights of one layer or linear"
ACTIVATIONS = "activations"
NEW_HARD_CODES = "hard masks of this step"
LOSS = "working memory of the vocabulary loss"
DENSE_LAYERS = "hidden states of the dense model"
LAYER = "working memory of a layer's backward"
EVALUATED = "hidden states of an evaluation"
ONE_MASK = "hard mask of one linear"
COPIES = "copies that a snapshot needs"
ALLOWANCE = "allowance: CUDA context, NCCL, fragmentation"


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at every moment of a run.

    Attributes:
        state: bytes that live from step to step, by part.
        moments: moment -> bytes that live within the moment, by part, at its busiest point.
        device: decides the bytes of CUDA context, NCCL and fragmentation, which are assumed, not
            counted.
    """

    state: dict[str, float]
    moments: dict[str, dict[str, float]]
    device: Device

    @property
    def step(self) -> dict[str, float]:
        """Bytes that live within a learning step, by part."""
        return self.moments[STEP]

    def parts_at(self, moment: str) -> dict[str, float]:
        """Bytes of all parts at a moment."""
        working = self.moments[moment]
        allowance = self.device.allowance(sum(working.values()))
        return {**self.state, **working, ALLOWANCE: allowance}

    def total_at(self, moment: str) -> float:
        """Bytes of all parts together at a moment."""
        return sum(self.parts_at(moment).values())

    @property
    def busiest(self) -> str:
        """The moment that takes the most memory."""
        return max(self.moments, key=self.total_at)

    @property
    def parts(self) -> dict[str, float]:
        """Bytes of all parts at the busiest moment."""
        return self.parts_at(self.busiest)

    @property
    def total(self) -> float:
        """Bytes of all parts together at the busiest moment."""
        return self.total_at(self.busiest)


def memory_of(work: Workload, device: Device) -> Memory:
    """Peak bytes of one rank of ``work`` on ``device``."""
    state, step = _state_and_step(work, device)
    moments = {
        STEP: step,
        EVALUATION: _evaluation(work, device),
        SNAPSHOT: _snapshot(work, device),
        RESUME: _resume(work, device),
        MASK_FILE: _mask_file(work),
    }
    if device.is_cpu and work.config.learn.snapshot.background:
        # The writer shares the pages of this process until a step overwrites them.
        shared = moments[SNAPSHOT][COPIES] + work.saved_bytes
        moments[BESIDE] = {**step, COPIES: shared}
    return Memory(state, moments, device)


def _state_and_step(work: Workload, device: Device) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes that stay, and bytes within a learning step, by part."""
    weights = work.masked_weights
    whole = {part: size * weights for part, size in work.state.items()}
    kept, gradients = {KEPT: whole.pop(KEPT)}, {STEP_GRADIENTS: whole.pop(STEP_GRADIENTS)}
    state = {**whole, OTHER_WEIGHTS: float(work.other_weights * work.width)}
    adds_up = max(work.mask_uses, default=0) > 1
    if adds_up and work.config.learn.state.grads == "fp32":
        state |= gradients  # a buffer that stays
    # The sum of the gradients of the micro-batches so far.
    before = {} if STEP_GRADIENTS in state or not adds_up else gradients
    after = {} if STEP_GRADIENTS in state else gradients
    moments = [
        {**before, **_at_loss(work, device)},
        {**before, **_in_layer(work, device)},
        {**after, ACTIVATIONS: 0.0},
    ]
    if work.forward_passes:
        attention = {ACTIVATIONS: 0.0, LAYER: 2 * stream(work) + in_attention(work)}
        moments = [_forward_at_loss(work, device), _forward_in_layer(work, device), attention]
    if work.config.learn.distillation.hidden > 0:
        kept[DENSE_LAYERS] = work.arch.num_layers * stream(work)
    step = {
        **kept,
        **max(moments, key=lambda moment: sum(moment.values())),
        NEW_HARD_CODES: weights * work.mean(work.code_bytes_of),
    }
    return state, step


def _at_loss(work: Workload, device: Device, backward: bool = True) -> dict[str, float]:
    """The busiest moment may be the loss: a chunk of the vocabulary's logits, an fp32 block of it,
    and the hidden states with their gradient, both whole on each rank. The slope of capped logits
    is a second chunk, and for a moment a third.
    """
    where, row = torch.device("cpu" if device.is_cpu else "cuda"), work.vocab_rows
    shard = VocabularyShard(first=0, real=row, rows=row)
    rows = min(work.tokens, chunk_size(shard, where))
    hidden = work.tokens * work.arch.hidden * work.width
    distillation, chunk, teacher = work.config.learn.distillation, row * rows * work.width, 0
    losses = row * min(rows, block_size(shard, where)) * 4
    if distillation.share > 0:  # the teacher's states and a chunk of its logits, and two blocks
        teacher = hidden + chunk
        blocks = 2 if distillation.top_k else 3  # and for a moment the products of both
        losses = blocks * row * min(rows, block_size(shard, where, buffers=2)) * 4
    if work.arch.logit_cap is not None and backward:
        losses = max(chunk + losses, 2 * chunk)
    return {
        ACTIVATIONS: saved_activations(work, device),
        LOSS: chunk + losses + 2 * hidden + teacher + gathered(work),
    }


def _forward_at_loss(work: Workload, device: Device) -> dict[str, float]:
    """The loss without a backward pass: no activations, and hidden states without a gradient."""
    hidden = work.tokens * work.arch.hidden * work.width
    return {ACTIVATIONS: 0.0, LOSS: _at_loss(work, device, backward=False)[LOSS] - hidden}


def _forward_in_layer(work: Workload, device: Device) -> dict[str, float]:
    """A layer without a backward pass: the residual stream and its norm, the outputs of the first
    linear and of the gated activation, and the masked weight of one linear.
    """
    largest = max((linear.weights for linear in work.linears if linear.is_masked), default=0)
    wide = work.tokens * work.ffn / work.tp * work.width
    outputs = 2
    if work.arch.gated:
        outputs = 3 if fuses_activation(work, device) else 4
    return {
        ONE_LAYER: float(largest * work.width) + _of_units(work, largest),
        ACTIVATIONS: 0.0,
        LAYER: 2 * stream(work) + outputs * wide + gathered(work),
    }


def _evaluation(work: Workload, device: Device) -> dict[str, float]:
    """The busiest point may be the fold of the largest linear, the activation after it, capped
    attention, or the loss. Nothing is saved for a backward pass.
    """
    there = work.evaluating
    largest = max((linear.weights for linear in work.linears if linear.is_masked), default=0)
    block = min(largest, BLOCK)  # weights whose mask exists at a time
    is_plain = work.config.learn.sampling.backend == "torch"

    def drawing(pattern: Pattern) -> float:
        return work.code_bytes_of(pattern) + (_reference(work, pattern) if is_plain else 0.0)

    codes = work.most(drawing)
    table = max((work.distribution.fold_bytes(one) for one in work.plan.distinct), default=0)
    masked = float(largest * work.width)
    wide = there.tokens * work.ffn / work.tp * work.width
    hidden = {EVALUATED: 2 * stream(there) + gathered(there)}
    points = [
        {**hidden, ONE_LAYER: masked, ONE_MASK: codes + block * (table + 1 + work.width)},
        {**hidden, ONE_LAYER: masked, LAYER: 2 * wide},
        {**hidden, LAYER: (3 if fuses_activation(work, device) else 5) * wide},
        {**hidden, LAYER: in_attention(there)},
        _forward_at_loss(there, device),
    ]
    return max(points, key=lambda point: sum(point.values()))


def _snapshot(work: Workload, device: Device) -> dict[str, float]:
    """Moments in the form of a snapshot, which CUDA tensors take on the host. A CPU run also copies
    the halves of [gate; up], which are views.
    """
    copied = _copied(work, device)
    return {COPIES: copied + max(_gated_bytes(work) if device.is_cpu else 0.0, _converted(work))}


def _resume(work: Workload, device: Device) -> dict[str, float]:
    """Moments in the form of a snapshot; all else is read into its place."""
    return {COPIES: _copied(work, device) + _converted(work)}


def _copied(work: Workload, device: Device) -> float:
    """Bytes of the device that hold moments in the form of a snapshot."""
    per_weight = work.mean(lambda one: work.method.copied_bytes(work.state_of(one)))
    return work.masked_weights * per_weight if device.is_cpu else 0.0


def _converted(work: Workload) -> float:
    """Bytes of one linear's moments in fp32, three times, where a snapshot holds another form."""

    def converted(pattern: Pattern) -> float:
        is_copied = work.method.copied_bytes(work.state_of(pattern)) > 0
        return 12.0 * work.logits_of(pattern) if is_copied else 0.0

    return work.most(converted)


def _gated_bytes(work: Workload) -> float:
    """Bytes in a snapshot of the logits and moments of [gate; up]."""
    gated = ((linear.weights, linear.pattern) for linear in work.linears if linear.is_gated)
    return sum(
        size * work.method.saved_bytes(work.state_of(pattern))
        for size, pattern in gated
        if pattern is not None
    )


def _mask_file(work: Workload) -> dict[str, float]:
    """Hard codes of the largest linear, of this rank and, on the first rank, of all shards."""
    shards = 2 if work.tp > 1 else 1
    return {ONE_MASK: shards * work.most(work.code_bytes_of, lambda one: one.whole)}


def _in_layer(work: Workload, device: Device) -> dict[str, float]:
    """The busiest moment may be the backward pass of the last masked layer: the gradients of two
    residual streams, and the largest of the needs of second linear, activation, first linear and
    capped attention.

    The weight gradient of one linear exists for a moment, unless a GPU's matmul adds it to an fp32
    sum, and so does its masked weight where it is drawn again.
    """
    config, arch = work.config, work.arch
    is_shared = config.learn.sampling.span > 1
    redrawn = config.learn.state.masked_weight == "regenerate" and not is_shared
    masked = [linear for linear in work.linears if linear.is_masked]
    layer = [linear for linear in masked if linear.layer == masked[-1].layer]
    largest = max((linear.weights for linear in layer), default=0)
    made: dict[str, float] = {}
    if not is_shared and (redrawn or config.parallel.recompute):
        made = {
            ONE_LAYER: float(
                work.width
                * (
                    largest
                    if redrawn
                    else sum(linear.weights for linear in layer if linear.is_recomputed)
                )
            )
        }
    wide = work.tokens * work.ffn / work.tp * work.width
    in_matmul = not device.is_cpu and config.learn.state.grads == "fp32"
    is_in_place = is_shared and (max(work.mask_uses, default=0) <= 1 or in_matmul)
    weight_grad = 0.0 if is_in_place else float(largest * work.width)
    whole_input = (
        work.tokens * arch.hidden * work.width
    )  # gradient of a column-parallel linear's input, whole on each rank
    if config.learn.sampling.backend == "torch" and not is_shared:
        weight_grad += largest * max(_reference(work, one) for one in work.plan.distinct)
    weight_grad += _of_units(work, largest)
    mlp = kept_by_activation(work, device) + 1  # and the input of the second linear
    # Before the first linear's turn they are gone, and the gradient of its output is there.
    freed = (mlp - (2 if arch.gated else 1)) * wide
    # When attention's turn comes, the feed-forward part's tensors are gone.
    scores = within_backward(work) - mlp * wide
    busiest = max(2 * wide, weight_grad + wide, weight_grad + whole_input - freed, scores)
    activations = saved_activations(work, device) + most_recomputed(work, device)
    return {**made, ACTIVATIONS: activations, LAYER: 2 * stream(work) + busiest + gathered(work)}


def _of_units(work: Workload, weights: int) -> float:
    """Bytes of the fp32 tensors with which a mask of pairs is drawn on a linear, or its gradient
    is made (``sparsity/unit_sampler.py``).
    """
    return PAIR_BYTES * weights if any(one.unit > 1 for one in work.plan.distinct) else 0.0


def _reference(work: Workload, pattern: Pattern) -> float:
    """Bytes a weight that plain PyTorch makes while it draws a mask of a pattern."""
    return work.distribution.reference_bytes(pattern) * work.logits_of(pattern)


def gathered(work: Workload) -> float:
    """Bytes of Megatron's buffer for the inputs that sequence parallel gathers."""
    return (
        work.tokens * work.arch.hidden * work.width
        if work.config.parallel.sequence_parallel
        else 0.0
    )
