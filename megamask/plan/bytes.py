"""Bytes of state per prunable weight. The one place that says what each choice of state costs;
tests compare it with real allocations.
"""

from __future__ import annotations

from megamask.config.learn_tree import OptimizerSection, SamplingSection, StateSection
from megamask.config.method_names import DISTRIBUTION_OF
from megamask.optim.optimizers import find_rule
from megamask.sparsity.distributions import DISTRIBUTIONS
from megamask.sparsity.pattern import Pattern

WIDTH = {"fp32": 4, "bf16": 2}  # bytes a number

WEIGHTS = "frozen weights"
LOGITS = "mask logits"
GRADIENTS = "gradients"
MOMENTS = "optimizer moments"
HARD_CODES = "hard masks of the mask statistics"
KEPT = "masked weights kept for the backward pass"
STEP_GRADIENTS = "gradients at the masked weights of a step"
PARTS = (WEIGHTS, LOGITS, GRADIENTS, MOMENTS, HARD_CODES, KEPT, STEP_GRADIENTS)


def state_bytes(
    pattern: Pattern,
    state: StateSection,
    optimizer: OptimizerSection,
    sampling: SamplingSection,
    accumulations: int = 1,
    dtype: str = "bf16",
    redrawn_share: float = 0.0,
    moments_share: float = 1.0,
    method: str = "categorical",
) -> dict[str, float]:
    """Bytes per prunable weight of everything whose size grows with the weights, by part
    (``PARTS``, in this order; 0 where unused).

    With r = C / M logits a weight (1.5 at 2:4), or r = 1 under learn.method=subset:

    - frozen weights: 2 (bf16) or 4 (fp32).
    - mask logits: 4 r (fp32) or 2 r (bf16).
    - gradients: the buffer in which micro-batches add up, 4 r or 2 r. The gradient of one layer
      that exists for a moment on top of it is no state.
    - optimizer moments: r times the ``moment_bytes`` of the update rule (adamw 8 r in fp32, 4 r in
      bf16). Tables of 256 entries and step counters do not grow with the weights. With
      optimizer.distributed a replica keeps ``moments_share`` of them.
    - winners: two uint8 a group (initial and latest), 2 / M, unless ``state.track_flips`` is off;
      subset takes 2 bytes each for M > 8, 4 for M > 16.
    - masked weights: one width of the weight when every layer's is held between forward and
      backward: with masked_weight=keep, or with draws=step, where they live for the whole step.
      With a draw per micro-batch 0 with regenerate, and recompute drops ``redrawn_share`` of them.
    - gradients at the masked weights: draws=step alone. 4 (fp32) when several micro-batches are
      added up and ``state.grads`` is fp32, else the width of the weight.

    method=maskpro runs no backward pass: of all that, it has weights, logits and winners, and one
    winner a group more, the initial mask. At 2:4 in bf16 6.75.

    The total is what a lean state is judged by: at 2:4 in bf16 default 26.5 (26 without
    winners), lean 14.5, leanest 9.5.

    Args:
        pattern: N:M.
        state: ``learn.state``.
        optimizer: ``learn.optimizer``.
        sampling: ``learn.sampling``.
        accumulations: micro-batches of a step on one replica.
        dtype: of the frozen weights, ``bf16`` or ``fp32``.
        redrawn_share: the share of the weights whose masked weights ``parallel.recompute`` makes
            again with the activations.
        moments_share: the share of the layers that one replica updates, 1 / replicas when they
            divide evenly.
        method: ``learn.method``.

    Raises:
        ConfigError: the pattern is too large for the distribution, or an unknown update rule.
    """
    distribution = DISTRIBUTIONS[DISTRIBUTION_OF[method]]
    group = distribution.logits_per_group(pattern)
    logits, weight = group / pattern.m, WIDTH[dtype]
    step_draw, hard_codes = (
        sampling.draws == "step",
        distribution.code_dtype(pattern).itemsize / pattern.m,
    )
    if method == "maskpro":
        kept = {
            WEIGHTS: weight,
            LOGITS: WIDTH[state.logits] * logits,
            HARD_CODES: (3 if state.track_flips else 1) * hard_codes,
        }
        return {part: kept.get(part, 0.0) for part in PARTS}
    return {
        WEIGHTS: weight,
        LOGITS: WIDTH[state.logits] * logits,
        GRADIENTS: WIDTH[state.grads] * logits,
        MOMENTS: find_rule(optimizer.kind).moment_bytes(state.logits, group)
        * logits
        * (moments_share if optimizer.distributed else 1.0),
        HARD_CODES: 2 * hard_codes if state.track_flips else 0.0,
        KEPT: weight
        if step_draw
        else weight * (1.0 - redrawn_share)
        if state.masked_weight == "keep"
        else 0.0,
        STEP_GRADIENTS: (WIDTH["fp32"] if accumulations > 1 and state.grads == "fp32" else weight)
        if step_draw
        else 0.0,
    }
