"""Bytes of attention whose scores are capped, which makes S x S scores of every head."""

from __future__ import annotations

from megamask.plan.workload import Workload


def capped_scores(work: Workload) -> float:
    """How many scores the heads of one rank have, where they are capped; else 0."""
    if work.arch.attention_cap is None:
        return 0.0
    return work.tokens * work.config.data.seq_length * work.arch.heads / work.tp


def kept_scores(work: Workload) -> float:
    """Bytes of scores that one layer keeps for its backward pass: tanh's and softmax's output, and
    the latter once more where the dtype of the model is narrower than fp32.
    """
    return capped_scores(work) * (work.width + 4 + _narrow(work))


def within_backward(work: Workload) -> float:
    """Bytes beside ``kept_scores`` within the backward pass of softmax: the gradients of its output
    and input in fp32. Its narrower copy is gone.
    """
    return capped_scores(work) * (8 - _narrow(work))


def in_attention(work: Workload) -> float:
    """Bytes within capped attention without a backward pass; 0 without a cap.

    Scores in the compute dtype, softmax's output in fp32 and, of narrower scores, its input in
    fp32; queries, keys and values, the former two once more after the rotation, and keys and values
    once more for every head.
    """
    if work.arch.attention_cap is None:
        return 0.0
    arch, width = work.arch, work.width
    q, k = arch.heads * arch.head_dim / work.tp, arch.kv_heads * arch.head_dim / work.tp
    score = width + 4 + (4 if _narrow(work) else 0)
    return capped_scores(work) * score + work.tokens * width * (4 * q + 3 * k)


def _narrow(work: Workload) -> int:
    """Bytes of a number of a dtype narrower than fp32, else 0."""
    return work.width if work.width < 4 else 0
