"""Distillation on a single process against a plain reference in fp64 with autograd.

Shapes: T tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F

from megamask.config import build_config
from megamask.errors import ConfigError
from megamask.model import vocabulary
from megamask.model.distillation import Distillation
from megamask.model.vocabulary import Capped, VocabularyShard, fused_loss

VOCAB, HIDDEN, TOKENS = 301, 24, 37
SHARD = VocabularyShard(0, VOCAB, VOCAB)
# Relative tolerance. A rounding of fp32 is 6e-8; a logit is a sum of 24 products of size up to 10,
# and a divergence or a gradient is a sum over 301 tokens. Measured: 6e-7.
FP32 = 5e-6
# Absolute tolerance of a divergence: it is a difference of numbers of size 10, which fp32 rounds by
# 6e-7. Measured: 4e-7.
SUMS = 2e-6


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use chunks of 16 tokens in blocks of 5."""
    monkeypatch.setattr(vocabulary, "CPU_CHUNK", 16)
    monkeypatch.setattr(vocabulary, "CPU_BLOCK_BYTES", 2 * 5 * 4 * VOCAB)


def inputs(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Hidden states of student and teacher, weight, labels, and a weight for each token's loss."""
    generator = torch.Generator().manual_seed(1)
    student_TH, noise_TH = (torch.randn(TOKENS, HIDDEN, generator=generator) for _ in range(2))
    weight_VH = torch.randn(VOCAB, HIDDEN, generator=generator)
    labels_T = torch.randint(VOCAB, (TOKENS,), generator=generator)
    upstream_T = torch.randn(TOKENS, generator=generator)
    return (
        (scale * student_TH).to(dtype),
        (scale * (student_TH + 0.3 * noise_TH)).to(dtype),
        weight_VH.to(dtype),
        labels_T,
        upstream_T,
    )


def fused(
    given: tuple[torch.Tensor, ...],
    temperature: float = 1.0,
    top_k: int | None = None,
    share: float = 1.0,
) -> list[torch.Tensor]:
    """Objective, lm, kd, and the gradient at the student's hidden states."""
    student_TH, teacher_TH, weight_VH, labels_T, upstream_T = given
    leaf = student_TH.clone().requires_grad_()
    losses = fused_loss(
        leaf,
        weight_VH,
        SHARD,
        Distillation(labels_T, teacher_TH, weight_VH, SHARD, temperature, top_k, share),
    )
    return [*(one.detach() for one in losses), torch.autograd.grad(losses[0], leaf, upstream_T)[0]]


def reference(
    given: tuple[torch.Tensor, ...],
    temperature: float = 1.0,
    top_k: int | None = None,
    share: float = 1.0,
) -> list[torch.Tensor]:
    student_TH, teacher_TH, weight_VH, labels_T, upstream_T = given
    leaf = student_TH.double().requires_grad_()
    student_TV, teacher_TV = (
        hidden.double() @ weight_VH.double().T for hidden in (leaf, teacher_TH)
    )
    lm_T = F.cross_entropy(student_TV, labels_T, reduction="none")
    log_q, log_p = (
        events(one / temperature, teacher_TV, top_k) for one in (student_TV, teacher_TV)
    )
    kd_T = temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
    objective_T = (1 - share) * lm_T + share * kd_T
    (grad_TH,) = torch.autograd.grad(objective_T, leaf, upstream_T.double())
    return [objective_T.detach(), lm_T.detach(), kd_T.detach(), grad_TH]


def events(logits_TV: torch.Tensor, teacher_TV: torch.Tensor, top_k: int | None) -> torch.Tensor:
    """Log-probabilities of all tokens, or of the teacher's top k and of all others together."""
    log_TV = logits_TV.log_softmax(1)
    if top_k is None:
        return log_TV
    ordered_TV = log_TV.gather(1, teacher_TV.argsort(1, descending=True))
    return torch.cat([ordered_TV[:, :top_k], ordered_TV[:, top_k:].logsumexp(1, keepdim=True)], 1)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference, relative to that of the expected values."""
    return float(
        (found.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    )


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("top_k", [None, 1, 7, 300])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_losses_and_gradient_are_those_of_fp64(
    temperature: float, top_k: int | None, share: float
) -> None:
    given = inputs()
    for found, expected in zip(
        fused(given, temperature, top_k, share),
        reference(given, temperature, top_k, share),
        strict=True,
    ):
        assert error(found, expected) < FP32


def test_the_comparison_sees_what_could_be_wrong() -> None:
    """Exchanged models, another k, another share and another temperature exceed the tolerance."""
    given = inputs()
    student_TH, teacher_TH, *rest = given
    right = fused(given, 2.0, 7, 0.3)
    exchanged = reference((teacher_TH, student_TH, *rest), 2.0, 7, 0.3)
    for wrong in (
        exchanged,
        reference(given, 2.0, 8, 0.3),
        reference(given, 2.0, 7, 0.301),
        reference(given, 2.05, 7, 0.3),
    ):
        assert error(right[0], wrong[0]) > 20 * FP32 and error(right[3], wrong[3]) > 20 * FP32


@pytest.mark.parametrize("top_k", [None, 1, 7, 1000])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_models_have_nothing_to_learn_from_each_other(
    dtype: torch.dtype, temperature: float, top_k: int | None
) -> None:
    """Student and teacher go through the same operations.

    The differences are not exactly 0, because a vectorised exponential may round equal numbers in
    two ways.
    """
    student_TH, _, *rest = inputs(dtype=dtype)
    objective_T, lm_T, kd_T, grad_TH = fused((student_TH, student_TH, *rest), temperature, top_k)
    *_, lm_grad_TH = fused((student_TH, student_TH, *rest), share=0.0)
    assert max(objective_T.abs().max(), kd_T.abs().max()) < SUMS
    assert grad_TH.abs().max() < FP32 * lm_grad_TH.abs().max()
    assert (lm_T > 0).all()


def test_the_top_tokens_and_a_rest_tell_less_than_all_tokens_but_never_less_than_nothing() -> None:
    """kd grows with k, and equals the kd of the whole vocabulary when k is at least its size."""
    given = inputs()
    whole_T = fused(given)[2]
    by_k = [fused(given, top_k=k)[2] for k in (1, 3, 30, 300)]
    for fewer, more in zip(by_k, [*by_k[1:], whole_T], strict=True):
        assert (fewer < more + SUMS).all() and (fewer > -SUMS).all()
    assert 0 < by_k[0].mean() < 0.9 * by_k[1].mean() and by_k[1].mean() < 0.9 * by_k[2].mean()
    for k in (301, 1000):
        for found, expected in zip(fused(given, top_k=k), fused(given), strict=True):
            assert error(found, expected) < FP32


def test_the_tie_of_two_tokens_is_not_decided_by_where_they_lie() -> None:
    """Ties are usual in bf16. Every token of this vocabulary has a twin: of an odd number of named
    tokens one would tie with the first of the others, and counts as another.
    """
    student_TH, teacher_TH, weight_VH, labels_T, upstream_T = inputs()
    weight_VH = weight_VH[: VOCAB // 2].repeat_interleave(2, 0)
    order = torch.randperm(len(weight_VH), generator=torch.Generator().manual_seed(2))
    place = order.argsort()
    given = (student_TH, teacher_TH, weight_VH, labels_T % len(order), upstream_T)
    moved = (student_TH, teacher_TH, weight_VH[order], place[labels_T % len(order)], upstream_T)
    for k in (3, 7):
        even = fused(given, top_k=k - 1)
        for found in (fused(given, top_k=k), fused(moved, top_k=k)):
            assert all(error(one, two) < FP32 for one, two in zip(found, even, strict=True))
        assert error(even[2], fused(given, top_k=k + 1)[2]) > 100 * FP32
    assert fused(given, top_k=1)[2].abs().max() < SUMS  # nothing is named


def test_the_student_is_told_how_much_is_left_for_the_rest() -> None:
    """kd sees the probability of the tokens that are not named.

    The student has the teacher's proportions among the three most likely tokens, but gives them
    more probability. The distributions renormalised over these tokens would be equal.
    """
    teacher_TV = torch.tensor([[3.0, 2.0, 1.0, 0.0, 0.0, 0.0]])
    student_TV = teacher_TV + torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]])
    shard, identity = VocabularyShard(0, 6, 6), torch.eye(6)
    objective = Distillation(torch.tensor([0]), teacher_TV, identity, shard, top_k=3)
    leaf = student_TV.requires_grad_()
    kd_T = fused_loss(leaf, identity, shard, objective)[0]
    kd_T.sum().backward()
    p, q = (float(one.softmax(1)[0, 3:].sum()) for one in (teacher_TV, student_TV.detach()))
    torch.testing.assert_close(
        kd_T.detach(),
        torch.tensor([p]).log().sub(torch.tensor([q]).log()) * p
        + (torch.tensor([1 - p]) / (1 - q)).log() * (1 - p),
        rtol=FP32,
        atol=0,
    )
    assert leaf.grad is not None and (leaf.grad[0, :3] > 0).all() and (leaf.grad[0, 3:] < 0).all()


@pytest.mark.parametrize("top_k", [None, 7])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_logits_far_apart_neither_overflow_nor_vanish(
    temperature: float, top_k: int | None
) -> None:
    given = inputs(scale=1e3)
    for found, expected in zip(
        fused(given, temperature, top_k, 0.3),
        reference(given, temperature, top_k, 0.3),
        strict=True,
    ):
        assert error(found, expected) < FP32
    # With the hidden states of another token, the student is certain of another next token.
    far_TH = given[0].flip(0)
    assert all(one.isfinite().all() for one in fused((far_TH, *given[1:]), temperature, top_k, 0.3))


@pytest.mark.parametrize("top_k", [None, 7])
def test_the_size_of_chunks_and_blocks_does_not_show(
    monkeypatch: pytest.MonkeyPatch, top_k: int | None
) -> None:
    """Only the order of sums within a matmul may differ."""
    given = inputs()
    pieces = fused(given, 2.0, top_k, 0.3)
    monkeypatch.setattr(vocabulary, "CPU_CHUNK", 512)
    monkeypatch.setattr(vocabulary, "CPU_BLOCK_BYTES", 16 << 20)
    for found, expected in zip(pieces, fused(given, 2.0, top_k, 0.3), strict=True):
        assert error(found, expected) < FP32


def test_only_the_objective_passes_gradients_on() -> None:
    student_TH, teacher_TH, weight_VH, labels_T, _ = inputs()
    losses = fused_loss(
        student_TH.requires_grad_(),
        weight_VH,
        SHARD,
        Distillation(labels_T, teacher_TH, weight_VH, SHARD),
    )
    assert [one.requires_grad for one in losses] == [True, False, False]
    with torch.no_grad():
        assert all(
            torch.equal(one, same)
            for one, same in zip(
                fused_loss(
                    student_TH,
                    weight_VH,
                    SHARD,
                    Distillation(labels_T, teacher_TH, weight_VH, SHARD),
                ),
                losses,
                strict=True,
            )
        )


@pytest.mark.parametrize("top_k", [None, 7])
def test_nothing_of_tokens_times_vocabulary_is_kept_or_made(top_k: int | None) -> None:
    """The largest tensor is the gradient at the hidden states, or the logits of 16 tokens."""
    student_TH, teacher_TH, weight_VH, labels_T, _ = inputs()
    student_TH, teacher_TH, labels_T = (
        student_TH.repeat(10, 1).requires_grad_(),
        teacher_TH.repeat(10, 1),
        labels_T.repeat(10),
    )
    made, saved = [], []

    def pack(one: torch.Tensor) -> torch.Tensor:
        saved.append(one.numel())
        return one

    def learn() -> tuple[torch.Tensor, ...]:
        objective = Distillation(labels_T, teacher_TH, weight_VH, SHARD, 2.0, top_k, 0.3)

        def spy(logits_TV: torch.Tensor, tokens: slice, gradient: bool) -> tuple[torch.Tensor, ...]:
            found = objective(logits_TV, tokens, gradient)
            made.append(largest_new())
            return found

        return fused_loss(student_TH, weight_VH, SHARD, spy)

    gc.collect()
    gc.freeze()  # nothing that exists now is looked at: the search is as short as what is new
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
            losses = learn()
        left = largest_new()
    finally:
        gc.unfreeze()
    assert len(losses[0]) == 370 and max(saved) == 370 * HIDDEN
    logits_of_a_chunk, gradient = 16 * VOCAB, 370 * HIDDEN
    assert max(made) == max(logits_of_a_chunk, gradient)
    assert left <= 370 * HIDDEN


def largest_new() -> int:
    """Elements of the largest tensor since the last ``gc.freeze``."""
    gc.collect()
    new = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
    return max(one.untyped_storage().nbytes() // 4 for one in new)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"share": -0.1}, "learn.distillation.share"),
        ({"share": 1.1}, "learn.distillation.share"),
        ({"temperature": 0}, "learn.distillation.temperature"),
        ({"temperature": 101}, "learn.distillation.temperature"),
        ({"top_k": 0}, "learn.distillation.top_k"),
        ({"topk": 5}, "learn.distillation.topk"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config({"learn": {"distillation": settings}})
    assert caught.value.key == key


CAP = (
    30.0  # logits reach 20; a smaller cap would make ties of them, which fp32 and fp64 order apart
)


def capped_reference(
    given: tuple[torch.Tensor, ...], temperature: float, top_k: int | None, share: float
) -> list[torch.Tensor]:
    """As ``reference``, of a model whose logits are cap * tanh(logit / cap)."""
    student_TH, teacher_TH, weight_VH, labels_T, upstream_T = given
    leaf = student_TH.double().requires_grad_()
    student_TV, teacher_TV = (
        CAP * torch.tanh(hidden.double() @ weight_VH.double().T / CAP)
        for hidden in (leaf, teacher_TH)
    )
    lm_T = F.cross_entropy(student_TV, labels_T, reduction="none")
    log_q, log_p = (
        events(one / temperature, teacher_TV, top_k) for one in (student_TV, teacher_TV)
    )
    kd_T = temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
    objective_T = (1 - share) * lm_T + share * kd_T
    (grad_TH,) = torch.autograd.grad(objective_T, leaf, upstream_T.double())
    return [objective_T.detach(), lm_T.detach(), kd_T.detach(), grad_TH]


@pytest.mark.parametrize(("temperature", "top_k", "share"), [(1.0, None, 0.3), (2.0, 7, 0.5)])
def test_capped_logits_have_their_own_losses_and_gradient(
    temperature: float, top_k: int | None, share: float
) -> None:
    given = inputs()
    student_TH, teacher_TH, weight_VH, labels_T, upstream_T = given
    expected = capped_reference(given, temperature, top_k, share)

    def found(teacher_cap: float | None) -> list[torch.Tensor]:
        leaf = student_TH.clone().requires_grad_()
        objective = Distillation(
            labels_T, teacher_TH, weight_VH, SHARD, temperature, top_k, share, teacher_cap
        )
        losses = fused_loss(leaf, weight_VH, SHARD, Capped(objective, CAP))
        gradient = torch.autograd.grad(losses[0], leaf, upstream_T)[0]
        return [*(one.detach() for one in losses), gradient]

    assert all(error(one, other) < FP32 for one, other in zip(found(CAP), expected, strict=True))
    # A teacher without the cap, and a model without it, are other models.
    assert error(found(None)[2], expected[2]) > 100 * FP32
    plain = fused(given, temperature, top_k, share)
    assert all(error(one, other) > 100 * FP32 for one, other in zip(plain, expected, strict=True))
