"""The fused vocabulary loss on a single process.

It is compared with a plain reference in fp64, and with separate logits, softmax and gradient.

Shapes: T tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from megamask.model import vocabulary
from megamask.model.vocabulary import CrossEntropy, VocabularyShard, fused_loss

VOCAB, HIDDEN = 301, 24
# Relative tolerance. A rounding of fp32 is 6e-8; a logit is a sum of 24 products of size up to 10,
# and a gradient is a sum over 301 tokens. Measured: 8e-8 and 4e-7.
FP32 = 5e-6
Answer = tuple[torch.Tensor, torch.Tensor]  # losses (T,), gradient at the hidden states (T, H)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use chunks of 16 tokens in blocks of 5."""
    monkeypatch.setattr(vocabulary, "CPU_CHUNK", 16)
    monkeypatch.setattr(vocabulary, "CPU_BLOCK_BYTES", 5 * 4 * VOCAB)


def inputs(
    tokens: int, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> tuple[torch.Tensor, ...]:
    """Hidden states, weight, labels, and a weight for each token's loss."""
    generator = torch.Generator().manual_seed(tokens)
    hidden_TH = torch.randn(tokens, HIDDEN, generator=generator).mul(scale).to(dtype)
    weight_VH = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype)
    labels_T = torch.randint(VOCAB, (tokens,), generator=generator)
    return hidden_TH, weight_VH, labels_T, torch.randn(tokens, generator=generator)


def whole(weight_VH: torch.Tensor) -> VocabularyShard:
    return VocabularyShard(0, len(weight_VH), len(weight_VH))


def answer(
    function: Callable[[torch.Tensor], torch.Tensor],
    hidden_TH: torch.Tensor,
    upstream_T: torch.Tensor,
) -> Answer:
    leaf = hidden_TH.detach().clone().requires_grad_()
    losses = function(leaf)
    losses.backward(upstream_T.to(losses.dtype))
    assert leaf.grad is not None
    return losses.detach(), leaf.grad


def fused(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_T: torch.Tensor,
    upstream_T: torch.Tensor,
) -> Answer:
    shard = whole(weight_VH)
    return answer(
        lambda leaf: fused_loss(leaf, weight_VH, shard, CrossEntropy(labels_T, shard))[0],
        hidden_TH,
        upstream_T,
    )


def separate(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_T: torch.Tensor,
    upstream_T: torch.Tensor,
) -> Answer:
    """The way of Megatron: logits in the compute dtype, softmax and its gradient in fp32.

    The gradient is rounded to the compute dtype for the matmul of the backward pass.
    """
    return answer(
        lambda leaf: F.cross_entropy(F.linear(leaf, weight_VH).float(), labels_T, reduction="none"),
        hidden_TH,
        upstream_T,
    )


def reference(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_T: torch.Tensor,
    upstream_T: torch.Tensor,
) -> Answer:
    """The losses and the gradient in fp64, without autograd."""
    logits_TV = hidden_TH.double() @ weight_VH.double().T
    chosen = torch.arange(len(labels_T)), labels_T
    losses = logits_TV.logsumexp(1) - logits_TV[chosen]
    grad_TV = logits_TV.softmax(1)
    grad_TV[chosen] -= 1
    return losses, upstream_T.double()[:, None] * (grad_TV @ weight_VH.double())


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference, relative to that of the expected values."""
    return float(
        (found.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    )


# A token, a block, a chunk, ragged chunks and blocks, whole chunks.
@pytest.mark.parametrize("tokens", [1, 5, 16, 37, 48])
def test_losses_and_gradients_are_those_of_fp64(tokens: int) -> None:
    given = inputs(tokens)
    for found, expected in zip(fused(*given), reference(*given), strict=True):
        assert error(found, expected) < FP32
    assert fused(*given)[0].dtype == torch.float32


def test_the_comparison_sees_a_wrong_label_and_a_forgotten_weight_of_a_token() -> None:
    hidden_TH, weight_VH, labels_T, upstream_T = inputs(37)
    expected = reference(hidden_TH, weight_VH, labels_T, upstream_T)
    wrong = labels_T.clone()
    wrong[36] = (wrong[36] + 1) % VOCAB
    assert all(
        error(a, b) > 100 * FP32
        for a, b in zip(fused(hidden_TH, weight_VH, wrong, upstream_T), expected, strict=True)
    )
    upstream_T[36] *= 1.1
    assert error(fused(hidden_TH, weight_VH, labels_T, upstream_T)[1], expected[1]) > 100 * FP32


@pytest.mark.parametrize("scale", [0.3, 1.0, 30.0])  # flat, ordinary and one-sided distributions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_as_exact_as_separate_logits(dtype: torch.dtype, scale: float) -> None:
    """The errors over 512 tokens are those of the separate computation.

    Both computations round at the same places, but fp32 sums may have another order. This changed
    errors, which are below 1e-6, by 4 %. The fused loss multiplies the finished gradient with the
    weight of a token, the separate computation the gradient at the logits. In bf16 this is another
    rounding, unless the weight is a power of two. It changed small errors by 10 %.
    """
    hidden_TH, weight_VH, labels_T, upstream_T = inputs(512, dtype, scale)
    for weights_T, allowed in ((torch.full_like(upstream_T, 1 / 512), 1.06), (upstream_T, 1.2)):
        given = hidden_TH, weight_VH, labels_T, weights_T
        for new, old, expected in zip(
            fused(*given), separate(*given), reference(*given), strict=True
        ):
            assert error(new, expected) < allowed * error(old, expected)


def test_logits_far_apart_neither_overflow_nor_vanish() -> None:
    hidden_TH, weight_VH, labels_T, upstream_T = inputs(16, scale=1e3)
    for found, expected in zip(
        *(f(hidden_TH, weight_VH, labels_T, upstream_T) for f in (fused, reference)), strict=True
    ):
        assert error(found, expected) < FP32


def test_padding_is_not_read() -> None:
    hidden_TH, weight_VH, labels_T, upstream_T = inputs(37)
    padded_VH = torch.cat([weight_VH, torch.full((3, HIDDEN), torch.nan)])
    shard = VocabularyShard(0, VOCAB, VOCAB + 3)
    found = answer(
        lambda leaf: fused_loss(leaf, padded_VH, shard, CrossEntropy(labels_T, shard))[0],
        hidden_TH,
        upstream_T,
    )
    for one, other in zip(found, fused(hidden_TH, weight_VH, labels_T, upstream_T), strict=True):
        assert torch.equal(one, other)
    unaware = fused(hidden_TH, padded_VH, labels_T, upstream_T)
    assert unaware[0].isnan().all()


@pytest.mark.parametrize("grad_mode", [True, False])
def test_without_need_no_gradient_is_made(grad_mode: bool) -> None:
    """No gradient is computed under no_grad, or for hidden states that require none."""
    hidden_TH, weight_VH, labels_T, _ = inputs(37)
    shard, asked = whole(weight_VH), []
    objective = CrossEntropy(labels_T, shard)

    def spy(logits_TV: torch.Tensor, tokens: slice, gradient: bool) -> tuple[torch.Tensor, ...]:
        asked.append(gradient)
        return objective(logits_TV, tokens, gradient)

    with torch.set_grad_enabled(grad_mode):
        (losses,) = fused_loss(hidden_TH.requires_grad_(not grad_mode), weight_VH, shard, spy)
    assert asked == [False] * 3 and not losses.requires_grad
    assert torch.equal(
        losses, fused_loss(hidden_TH.detach().requires_grad_(), weight_VH, shard, objective)[0]
    )


def test_a_retained_graph_gives_the_same_twice() -> None:
    hidden_TH, weight_VH, labels_T, upstream_T = inputs(37)
    leaf, shard = hidden_TH.requires_grad_(), whole(weight_VH)
    (losses,) = fused_loss(leaf, weight_VH, shard, CrossEntropy(labels_T, shard))
    first, second = (
        torch.autograd.grad(losses, leaf, upstream_T, retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


def largest_kept(function: Callable[[], torch.Tensor]) -> int:
    """Number of elements of the largest tensor that lives between forward and backward.

    The garbage collector finds the tensors, and a hook the tensors that the graph saves.
    """
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    gc.collect()
    before = {id(one) for one in gc.get_objects() if isinstance(one, torch.Tensor)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = function()
    gc.collect()
    sizes += [
        one.untyped_storage().nbytes() // 4
        for one in gc.get_objects()
        if isinstance(one, torch.Tensor) and id(one) not in before
    ]
    del losses
    return max(sizes)


def test_nothing_of_tokens_times_vocabulary_stays() -> None:
    hidden_TH, weight_VH, labels_T, _ = inputs(200)
    leaf, shard = hidden_TH.requires_grad_(), whole(weight_VH)
    assert (
        largest_kept(lambda: fused_loss(leaf, weight_VH, shard, CrossEntropy(labels_T, shard))[0])
        == 200 * HIDDEN
    )
    separate_kept = largest_kept(
        lambda: F.cross_entropy(F.linear(leaf, weight_VH), labels_T, reduction="none")
    )
    assert separate_kept >= 200 * VOCAB
