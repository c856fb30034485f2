"""The fused vocabulary loss at TP 1, 2 and 4, with and without sequence parallel, against fp64: padded, tied, and ranks without real rows.

Shapes: S sequence, B batch, T = S x B tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from megamask.config import Config
from megamask.model import vocabulary
from megamask.model.build import build_model
from megamask.model.vocabulary import CrossEntropy
from megamask.parallel.mesh import start
from megamask.weights.architecture import Architecture
from tests.parallel.ranks import meet_again, run_ranks

SEQUENCE, BATCH, HIDDEN = 12, 3, 32


@dataclass(frozen=True)
class Case:
    """A vocabulary that does not divide by 2 or 4; of 5 tokens at TP 4, the last rank has no real row."""

    vocab: int
    tied: bool
    dtype: str = "fp32"


CASES = [Case(131, False), Case(131, True), Case(5, False), Case(131, False, "bf16")]
LAYOUTS = [(1, False), (2, False), (2, True), (4, False), (4, True)]


def inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states (S, B, H), weight (V, H), labels (B, S), and a weight for each token's loss (B, S)."""
    generator = torch.Generator().manual_seed(case.vocab)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.dtype]
    hidden_SBH = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator).to(dtype)
    weight_VH = torch.randn(case.vocab, HIDDEN, generator=generator).to(dtype)
    labels_BS = torch.randint(case.vocab, (BATCH, SEQUENCE), generator=generator)
    return hidden_SBH, weight_VH, labels_BS, torch.randn(BATCH, SEQUENCE, generator=generator)


def run_cases(rank: int, tp: int, sequence_parallel: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Losses (B, S) and gradient at this rank's hidden states of every case. Eight tokens a chunk; four a block if padding did not count,
    which it must: ranks that held less of it would meet the others fewer times."""
    vocabulary.CPU_CHUNK, vocabulary.CPU_BLOCK_BYTES = 8, 4 * 4 * (131 // tp)
    found = []
    for case in CASES:
        found.append(run_case(case, tp, sequence_parallel))
        meet_again()
    return found


def run_case(case: Case, tp: int, sequence_parallel: bool) -> tuple[torch.Tensor, torch.Tensor]:
    parallel = {"tp": tp, "threads": 1, "sequence_parallel": sequence_parallel}
    config = Config.model_validate({"device": "cpu", "dtype": case.dtype, "parallel": parallel})
    arch = Architecture("llama", num_layers=1, hidden=HIDDEN, ffn=64, heads=4, kv_heads=4, head_dim=8, vocab=case.vocab,
                        max_positions=SEQUENCE, tied=case.tied, norm_eps=1e-5, rope_theta=1e4)  # fmt: skip
    hidden_SBH, weight_VH, labels_BS, upstream_BS = inputs(case)
    with start(config) as mesh:
        model = build_model(config, arch, mesh)
        head = model.embedding.word_embeddings if case.tied else model.output_layer
        with torch.no_grad():
            mine = weight_VH[model.shard.first : model.shard.first + model.shard.rows]
            assert len(mine) == model.shard.real
            head.weight.fill_(torch.nan)[: len(mine)] = mine
        if sequence_parallel:
            hidden_SBH = hidden_SBH.chunk(tp)[mesh.tp_rank]
        leaf = hidden_SBH.clone().requires_grad_()
        losses_BS = model.losses(leaf, CrossEntropy(labels_BS.t().flatten(), model.shard))
        losses_BS.backward(upstream_BS)
        assert leaf.grad is not None and losses_BS.dtype == torch.float32
        return losses_BS.detach(), leaf.grad


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: f"tp{layout[0]}{'-sp' * layout[1]}")
def found(request: pytest.FixtureRequest) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Losses (B, S) and gradient (S, B, H) of every case; the ranks agree to the last bit."""
    tp, sequence_parallel = request.param
    by_rank = run_ranks(run_cases, tp, tp, sequence_parallel)
    joined = []
    for ranks in zip(*by_rank, strict=True):
        losses, grads = zip(*ranks, strict=True)
        assert all(torch.equal(one, losses[0]) for one in losses)
        assert sequence_parallel or all(torch.equal(one, grads[0]) for one in grads)
        joined.append((losses[0], torch.cat(grads) if sequence_parallel else grads[0]))
    return joined


def reference(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 on one process."""
    hidden_SBH, weight_VH, labels_BS, upstream_BS = inputs(case)
    leaf = hidden_SBH.double().requires_grad_()
    logits_BVS = (leaf @ weight_VH.double().T).permute(1, 2, 0)
    losses_BS = torch.nn.functional.cross_entropy(logits_BVS, labels_BS, reduction="none")
    losses_BS.backward(upstream_BS.double())
    assert leaf.grad is not None
    return losses_BS.detach(), leaf.grad


# Of the root mean square. fp32: sums over 32 and 131 numbers, 6e-8 a rounding; seen 3e-7. bf16: 2^-9 = 2e-3 a rounding of logits of size
# 6, of the gradient at them, of each rank's gradient and of their sum; seen 6e-3.
TOLERANCE = {"fp32": 2e-6, "bf16": 2e-2}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{case.vocab}-{'tied' * case.tied}-{case.dtype}" for case in CASES])
def test_every_layout_says_what_fp64_says(found: list[tuple[torch.Tensor, torch.Tensor]], number: int) -> None:
    case = CASES[number]
    for one, expected in zip(found[number], reference(case), strict=True):
        assert error(one, expected) < TOLERANCE[case.dtype]
    wrong = found[number][1].roll(1, dims=0)  # gradients of other tokens
    assert error(wrong, reference(case)[1]) > 10 * TOLERANCE[case.dtype]
