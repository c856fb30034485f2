"""The fused vocabulary losses against fp64 at TP 1, 2 and 4, with and without sequence parallel:
padded, tied, ranks without real rows.

Shapes: S sequence, B batch, T = S x B tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from megamask.config import Config
from megamask.model import vocabulary
from megamask.model.build import build_model
from megamask.model.distillation import Distillation
from megamask.model.language_model import LanguageModel
from megamask.model.top_token import WithTopToken
from megamask.model.vocabulary import CrossEntropy, Objective
from megamask.parallel.mesh import Mesh, start
from megamask.weights.architecture import Architecture
from tests.parallel.ranks import run_ranks

pytestmark = pytest.mark.slow

SEQUENCE, BATCH, HIDDEN = 12, 3, 32


@dataclass(frozen=True)
class Case:
    """A vocabulary that does not divide by 2 or 4; of 5 tokens at TP 4, the last rank has no real
    row.
    """

    vocab: int
    tied: bool
    dtype: str = "fp32"
    kd: tuple[float, int | None, float] | None = (
        None  # temperature, top_k and share of distillation
    )
    top: bool = False  # also the most likely token
    ties: bool = False  # whole logits with a few values


CASES = [
    Case(131, False),
    Case(131, True),
    Case(5, False),
    Case(131, False, "bf16"),
    Case(131, False, kd=(1.0, None, 1.0)),
    Case(131, True, kd=(2.0, None, 0.3)),
    Case(5, False, kd=(1.0, None, 0.3)),
    Case(131, False, "bf16", kd=(1.0, None, 1.0)),
    Case(131, False, kd=(1.0, 9, 1.0)),
    Case(131, True, kd=(2.0, 60, 0.3)),  # more than a rank of TP 4 holds
    Case(5, False, kd=(1.0, 3, 0.3)),
    Case(5, False, kd=(1.0, 8, 1.0)),  # more than there are
    Case(131, False, top=True),
    Case(5, False, kd=(1.0, None, 1.0), top=True),
    Case(131, False, "bf16", top=True, ties=True),
]
LAYOUTS = [
    (1, False),
    (2, False),
    (2, True),
    pytest.param(
        (4, False), marks=pytest.mark.nightly
    ),  # as (4, True), without sequence parallel as (2, False)
    (4, True),
]


def inputs(case: Case) -> tuple[torch.Tensor, ...]:
    """Hidden states (S, B, H), weight (V, H), labels (B, S), a weight for each token's loss (B, S),
    a teacher's hidden states (S, B, H).
    """
    generator = torch.Generator().manual_seed(case.vocab)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.dtype]
    hidden_SBH = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator).to(dtype)
    weight_VH = torch.randn(case.vocab, HIDDEN, generator=generator).to(dtype)
    if case.ties:
        hidden_SBH, weight_VH = hidden_SBH.sign(), weight_VH.sign()
    labels_BS = torch.randint(case.vocab, (BATCH, SEQUENCE), generator=generator)
    upstream_BS = torch.randn(BATCH, SEQUENCE, generator=generator)
    teacher_SBH = hidden_SBH + 0.5 * torch.randn(hidden_SBH.shape, generator=generator).to(dtype)
    return hidden_SBH, weight_VH, labels_BS, upstream_BS, teacher_SBH


def run_cases(rank: int, tp: int, sequence_parallel: bool) -> list[list[torch.Tensor]]:
    """Losses (B, S) and gradient at this rank's hidden states of every case. Eight tokens a chunk;
    four a block (of distillation two) if
    padding did not count, which it must: ranks that held less of it would meet the others fewer
    times."""
    vocabulary.CPU_CHUNK, vocabulary.CPU_BLOCK_BYTES = 8, 4 * 4 * (131 // tp)
    parallel = {"tp": tp, "threads": 1, "sequence_parallel": sequence_parallel}
    settings = {"device": "cpu", "parallel": parallel}
    with start(Config.model_validate(settings)) as mesh:
        return [
            run_case(case, Config.model_validate({**settings, "dtype": case.dtype}), mesh)
            for case in CASES
        ]


def run_case(case: Case, config: Config, mesh: Mesh) -> list[torch.Tensor]:
    arch = Architecture(
        "llama",
        num_layers=1,
        hidden=HIDDEN,
        ffn=64,
        heads=4,
        kv_heads=4,
        head_dim=8,
        vocab=case.vocab,
        max_positions=SEQUENCE,
        tied=case.tied,
    )
    hidden_SBH, weight_VH, labels_BS, upstream_BS, teacher_SBH = inputs(case)
    model = build_model(config, arch, mesh)
    head = model.embedding.word_embeddings if case.tied else model.output_layer
    with torch.no_grad():
        mine = weight_VH[model.shard.first : model.shard.first + model.shard.rows]
        assert len(mine) == model.shard.real
        head.weight.fill_(torch.nan)[: len(mine)] = mine
    if config.parallel.sequence_parallel:
        hidden_SBH, teacher_SBH = (
            one.chunk(mesh.tp)[mesh.tp_rank] for one in (hidden_SBH, teacher_SBH)
        )
    leaf = hidden_SBH.clone().requires_grad_()
    objective_BS, *parts = model.losses(leaf, objective(case, model, labels_BS, teacher_SBH))
    objective_BS.backward(upstream_BS)
    assert leaf.grad is not None and objective_BS.dtype == torch.float32
    return [objective_BS.detach(), *parts, leaf.grad]


def objective(
    case: Case, model: LanguageModel, labels_BS: torch.Tensor, teacher_SBH: torch.Tensor
) -> Objective:
    if case.top:
        plain = objective(replace(case, top=False), model, labels_BS, teacher_SBH)
        return WithTopToken(plain, model.shard)
    labels_T = labels_BS.t().flatten()
    if case.kd is None:
        return CrossEntropy(labels_T, model.shard)
    teacher_TH, weight_VH = (
        model.whole(teacher_SBH).flatten(0, 1),
        model.head_VH[: model.shard.real],
    )
    return Distillation(labels_T, teacher_TH, weight_VH, model.shard, *case.kd)


@pytest.fixture(
    scope="module", params=LAYOUTS, ids=lambda layout: f"tp{layout[0]}{'-sp' * layout[1]}"
)
def found(request: pytest.FixtureRequest) -> list[list[torch.Tensor]]:
    """Losses (B, S) and gradient (S, B, H) of every case; the ranks agree to the last bit."""
    tp, sequence_parallel = request.param
    by_rank = run_ranks(run_cases, tp, tp, sequence_parallel)
    joined = []
    for ranks in zip(*by_rank, strict=True):
        *losses, grads = zip(*ranks, strict=True)
        for kind in losses:
            assert all(torch.equal(one, kind[0]) for one in kind)
        assert sequence_parallel or all(torch.equal(one, grads[0]) for one in grads)
        joined.append(
            [*(kind[0] for kind in losses), torch.cat(grads) if sequence_parallel else grads[0]]
        )
    return joined


def reference(case: Case) -> list[torch.Tensor]:
    """fp64 on one process, differentiated by autograd."""
    hidden_SBH, weight_VH, labels_BS, upstream_BS, teacher_SBH = inputs(case)
    leaf = hidden_SBH.double().requires_grad_()
    logits_SBV, teacher_SBV = (
        hidden @ weight_VH.double().T for hidden in (leaf, teacher_SBH.double())
    )
    lm_BS = torch.nn.functional.cross_entropy(
        logits_SBV.permute(1, 2, 0), labels_BS, reduction="none"
    )
    losses = [lm_BS]
    if case.kd is not None:
        temperature, top_k, share = case.kd
        kd_BS = (
            temperature**2
            * divergence(teacher_SBV / temperature, logits_SBV / temperature, top_k).t()
        )
        losses = [(1 - share) * lm_BS + share * kd_BS, lm_BS, kd_BS]
    if case.top:
        losses.append(logits_SBV.argmax(-1).t().double())
    losses[0].backward(upstream_BS.double())
    assert leaf.grad is not None
    return [*(one.detach() for one in losses), leaf.grad]


def divergence(teacher_V: torch.Tensor, student_V: torch.Tensor, top_k: int | None) -> torch.Tensor:
    """KL of softmax over the last axis; with ``top_k``, of the teacher's first k and all others
    together.
    """
    p, q = teacher_V.softmax(-1), student_V.softmax(-1)
    if top_k is not None and top_k < p.shape[-1]:
        order = teacher_V.argsort(-1, descending=True)
        p, q = (one.gather(-1, order) for one in (p, q))
        p, q = (
            torch.cat([one[..., :top_k], one[..., top_k:].sum(-1, keepdim=True)], -1)
            for one in (p, q)
        )
    return (p * (p / q).log()).sum(-1)


# Of the root mean square. fp32: sums over 32 and 131 numbers, 6e-8 a rounding; seen 3e-7. bf16:
# 2^-9 = 2e-3 a rounding of logits of size 6, of the gradient at them, of each rank's gradient and
# of their sum; seen 6e-3.
TOLERANCE = {"fp32": 2e-6, "bf16": 2e-2}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(
        (found.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    )


@pytest.mark.parametrize(
    "number",
    range(len(CASES)),
    ids=[
        f"{case.vocab}-{'tied' * case.tied}-{case.dtype}-{case.kd}{'-top' * case.top}"
        f"{'-ties' * case.ties}"
        for case in CASES
    ],
)
def test_every_layout_says_what_fp64_says(found: list[list[torch.Tensor]], number: int) -> None:
    case = CASES[number]
    for one, expected in zip(found[number], reference(case), strict=True):
        assert error(one, expected) < TOLERANCE[case.dtype]
    if case.top:  # of equal logits the first, in every layout
        assert torch.equal(found[number][-2].double(), reference(case)[-2])
    wrong = found[number][-1].roll(1, dims=0)  # gradients of other tokens
    assert error(wrong, reference(case)[-1]) > 10 * TOLERANCE[case.dtype]
