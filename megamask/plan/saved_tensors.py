"""Activations: the tensors that the layers save for the backward pass, with PyTorch's own norm
and attention (Transformer Engine's need less), and on a GPU the fused activation.

Attention makes S x S scores under a cap alone; a layer whose window cuts keys off keeps an S x S
mask.

Legend: S sequence, T tokens of a micro-batch, H hidden, Q and K the widths of this rank's queries
and keys, F of its feed-forward.
"""

from __future__ import annotations

from megamask.plan.capped_attention import kept_scores
from megamask.plan.hardware import Device
from megamask.plan.passes import fuses_activation
from megamask.plan.workload import Workload


def kept_by_activation(work: Workload, device: Device) -> int:
    """Numbers a token that the activation keeps, in units of F.

    Both halves of a gated activation, and in separate passes SiLU's output and the other half too;
    without a gate the input.
    """
    if not work.arch.gated:
        return 1
    return 2 if fuses_activation(work, device) else 4


def layer_activations(work: Workload, layer: int, device: Device) -> float:
    """Bytes that a layer saves for its backward pass.

    Per token: two norms' fp32 inputs (4 H each), or four's, inputs of the four linears (H, Q, H,
    F), fused q/k/v before and q, k after the rotation, attention's log-sums (4 a head, none under a
    cap, which keeps scores), and what the activation keeps.
    """
    arch, tp = work.arch, work.tp
    hidden = arch.hidden / (tp if work.config.parallel.sequence_parallel else 1)
    q, k, f = (
        arch.heads * arch.head_dim / tp,
        arch.kv_heads * arch.head_dim / tp,
        work.ffn_of(layer) / tp,
    )
    numbers = (
        hidden
        + work.mlp_inputs(layer) * arch.hidden
        + (q + f)
        + (q + 2 * k)
        + (q + k)
        + kept_by_activation(work, device) * f
    )
    norms = 2 * arch.pre_norms + 2 * arch.post_norms
    sums = 0 if arch.attention_cap is not None else 4 * arch.heads / tp
    rotary = 4 * work.config.data.seq_length * arch.head_dim * work.width
    return (
        work.tokens * (work.width * numbers + 4 * norms * hidden + sums)
        + rotary
        + kept_scores(work)
    )


def window_activations(work: Workload, layer: int) -> float:
    """Bytes that a layer saves beside ``layer_activations`` where keys are masked.

    PyTorch keeps the S x S mask of a window in the dtype of the model, and that of capped scores in
    one byte a key. Keys and values that are repeated for every head (2 Q a token) take the place of
    fused q/k/v and rotated k, or come beside the fused tensor that a norm of q and k keeps.
    """
    arch, length = work.arch, work.config.data.seq_length
    window, is_capped = arch.layer(layer).window, arch.attention_cap is not None
    if not is_capped and (window is None or window >= length):
        return 0.0
    q, k = (heads * arch.head_dim / work.tp for heads in (arch.heads, arch.kv_heads))
    repeated = 0.0
    if q != k:
        repeated = 2 * q - k if arch.qk_norm else q - 3 * k
    return length**2 * (1 if is_capped else work.width) + work.width * work.tokens * repeated


def recomputed_activations(work: Workload, layer: int, device: Device) -> float:
    """Bytes of a layer that ``parallel.recompute`` makes again: all of them, or the feed-forward
    part's without its input: what the activation keeps, the input of the second linear (F a token),
    and the copies and outputs of experts.
    """
    if work.config.parallel.recompute == "mlp":
        parts = kept_by_activation(work, device) + 1
        copies = work.mlp_inputs(layer) * work.arch.hidden - stream(work) / work.tokens / work.width
        return work.tokens * work.width * (parts * work.ffn_of(layer) / work.tp + copies)
    if not work.config.parallel.recompute:
        return 0.0
    return layer_activations(work, layer, device) + window_activations(work, layer)


def most_recomputed(work: Workload, device: Device) -> float:
    """Bytes of ``recomputed_activations`` of the layer that has the most."""
    layers = range(work.arch.num_layers)
    return max(recomputed_activations(work, layer, device) for layer in layers)


def stream(work: Workload) -> float:
    """Bytes of the hidden states between two layers."""
    return (
        work.tokens
        * work.arch.hidden
        / (work.tp if work.config.parallel.sequence_parallel else 1)
        * work.width
    )


def saved_activations(work: Workload, device: Device) -> float:
    """Bytes of activations when the forward pass of all layers is over.

    The norm of the first layer saves nothing, because the embedding is frozen.
    """
    layers = range(work.arch.num_layers)
    fp32_stream = stream(work) * 4 / work.width
    if work.config.parallel.recompute is True:
        return len(layers) * stream(work) + fp32_stream
    return sum(
        layer_activations(work, layer, device)
        - recomputed_activations(work, layer, device)
        + window_activations(work, layer)
        for layer in layers
    )
