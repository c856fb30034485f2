"""Masked column and row parallel linears at TP 1, 2, 4, 8 against an unsharded fp64 reference.

Shapes: S sequence, B batch, O out_features, I in_features, G groups per row, C candidates.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from megatron.core.model_parallel_config import ModelParallelConfig

from megamask.config import Config
from megamask.parallel.mask_context import MaskSwitch, RunningSample
from megamask.parallel.masked_linear import MaskedColumnParallelLinear, MaskedRowParallelLinear
from megamask.parallel.mesh import Mesh, start
from megamask.sparsity.backends import choose_backend
from megamask.sparsity.categorical.categorical import CATEGORICAL
from megamask.sparsity.draw import Sample
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.pattern import Pattern
from tests.parallel.ranks import run_ranks
from tests.unit.sparsity.categorical import reference

SEQUENCE, BATCH, OUT, IN = (
    16,
    2,
    64,
    64,
)  # at TP 8 a row-parallel rank holds 8 inputs: two groups of 2:4
PATTERN = Pattern(2, 4)
KEY, PARAMETER = NoiseKey(seed=3, step=5, micro_batch=2), 4711
KAPPA, TAU, COEF = 100.0, 1.0, 1e-2
KV_GROUPS, QUERY_ROWS, KV_ROWS = (
    8,
    4,
    2,
)  # a fused qkv linear: 8 x [4 query rows, 2 key rows, 2 value rows]


@dataclass(frozen=True)
class Case:
    """One linear."""

    kind: str  # column, gated, qkv or row
    bias: bool
    sequence_parallel: bool
    backend: str = "numba"


CASES = [
    Case(*choice)
    for choice in itertools.product(("column", "gated", "qkv", "row"), (False, True), (False, True))
]
CASES += [Case(kind, True, True, "torch") for kind in ("column", "gated", "row")]


def tensors(kind: str) -> dict[str, torch.Tensor]:
    """Input (S, B, I), gradient of the output (S, B, O), weight (O, I), bias (O), logits (O, C, G):
    whole, fp32.
    """
    generator = torch.Generator().manual_seed(len(kind))
    shapes = {
        "x": (SEQUENCE, BATCH, IN),
        "dy": (SEQUENCE, BATCH, OUT),
        "weight": (OUT, IN),
        "bias": (OUT,),
    }
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made["logits"] = 0.01 * torch.randn(
        OUT, PATTERN.num_candidates, IN // PATTERN.m, generator=generator
    )
    if kind == "qkv":
        for name in ("weight", "bias"):  # what a mapping from separate q, k and v does
            q, k, v = made[name].split(
                [KV_GROUPS * QUERY_ROWS, KV_GROUPS * KV_ROWS, KV_GROUPS * KV_ROWS]
            )
            parts = [part.unflatten(0, (KV_GROUPS, -1)) for part in (q, k, v)]
            made[name] = torch.cat(parts, dim=1).flatten(0, 1)
    return made


def shard(kind: str, whole: torch.Tensor, axis: int, rank: int, tp: int) -> torch.Tensor:
    """This rank's part; of a gated linear, its part of the gate over its part of the up rows."""
    if kind == "gated" and axis == 0:
        return torch.cat([half.chunk(tp)[rank] for half in whole.chunk(2)])
    return whole.chunk(tp, dim=axis)[rank].contiguous()


def join(kind: str, shards: list[torch.Tensor], axis: int) -> torch.Tensor:
    """Undo ``shard`` along the axis of the rows."""
    if kind == "gated":
        return torch.cat(
            [
                torch.cat([one.chunk(2, dim=axis)[half] for one in shards], dim=axis)
                for half in range(2)
            ],
            dim=axis,
        )
    return torch.cat(shards, dim=axis)


def run_linears(rank: int, tp: int, cases: list[Case]) -> list[dict[str, torch.Tensor]]:
    """Output, gradients and norm of every case on this rank."""
    with start(Config.model_validate({"parallel": {"tp": tp, "threads": 1}})) as mesh:
        return [run_linear(case, mesh) for case in cases]


def run_linear(case: Case, mesh: Mesh) -> dict[str, torch.Tensor]:
    whole, is_row = tensors(case.kind), case.kind == "row"
    linear = make_linear(case)
    with torch.no_grad():
        linear.weight.copy_(
            shard(case.kind, whole["weight"], 1 if is_row else 0, mesh.tp_rank, mesh.tp)
        )
        if case.bias:
            linear.bias.copy_(
                whole["bias"]
                if is_row
                else shard(case.kind, whole["bias"], 0, mesh.tp_rank, mesh.tp)
            )
    linear.requires_grad_(False)
    running = RunningSample(Sample(KEY, KAPPA, TAU), COEF)
    switch = MaskSwitch(running)
    linear.attach_logits(
        linear.make_site(PATTERN, case.kind, CATEGORICAL),
        PARAMETER,
        switch,
        choose_backend(case.backend, mesh.device, CATEGORICAL),
    )
    with torch.no_grad():
        linear.mask_logits.copy_(
            shard(case.kind, whole["logits"], 2 if is_row else 0, mesh.tp_rank, mesh.tp)
        )

    x, dy = whole["x"], whole["dy"]
    if is_row:
        x = shard("row", x, 2, mesh.tp_rank, mesh.tp)
        dy = dy.chunk(mesh.tp)[mesh.tp_rank] if case.sequence_parallel else dy
    else:
        x = x.chunk(mesh.tp)[mesh.tp_rank] if case.sequence_parallel else x
        dy = shard(case.kind, dy.movedim(2, 0), 0, mesh.tp_rank, mesh.tp).movedim(0, 2)
    x = x.clone().requires_grad_()
    y, _ = linear(x)
    y.backward(dy.contiguous())
    assert linear.weight.grad is None
    norm = mesh.sum_over_tp(running.measured[PARAMETER].norm.clone())
    return {"y": y.detach(), "dx": x.grad, "dlogits": linear.mask_logits.grad, "norm": norm}


def make_linear(case: Case) -> Any:
    settings = ModelParallelConfig(
        tensor_model_parallel_size=torch.distributed.get_world_size(),
        sequence_parallel=case.sequence_parallel,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=torch.float32,
    )
    common: dict[str, Any] = {
        "config": settings,
        "init_method": torch.nn.init.zeros_,
        "bias": case.bias,
        "skip_bias_add": False,
    }
    if case.kind == "row":
        return MaskedRowParallelLinear(IN, OUT, input_is_parallel=True, **common)
    return MaskedColumnParallelLinear(
        IN, OUT, gather_output=False, stride=2 if case.kind == "gated" else 1, **common
    )


def gather(case: Case, ranks: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Whole tensors from all ranks' parts; what every rank holds must agree to the bit."""
    columns, rows = (
        ("y", "dx") if case.kind != "row" else ("dx", "y")
    )  # split over features, and over the sequence or not at all
    whole = {columns: join(case.kind, [one[columns] for one in ranks], 2), "norm": ranks[0]["norm"]}
    whole["dlogits"] = join(
        case.kind, [one["dlogits"] for one in ranks], 2 if case.kind == "row" else 0
    )
    if case.sequence_parallel:
        whole[rows] = torch.cat([one[rows] for one in ranks])
    else:
        assert all(torch.equal(one[rows], ranks[0][rows]) for one in ranks)
        whole[rows] = ranks[0][rows]
    return whole


@cache
def expected(
    kind: str, bias: bool, step: int = KEY.step, sign: float = 1.0
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The unsharded layer in fp64 by autograd, and for each result the size of the terms that are
    summed.
    """
    t = {name: tensor.double() for name, tensor in tensors(kind).items()}
    noise = reference.gumbel(
        NoiseKey(KEY.seed, step, KEY.micro_batch, PARAMETER),
        OUT,
        PATTERN.num_candidates,
        IN // PATTERN.m,
    )
    x, logits = t["x"].requires_grad_(), t["logits"].requires_grad_()
    masked = t["weight"] * reference.mask(logits, noise, PATTERN.n, PATTERN.m, sign * KAPPA, TAU)
    y = x @ masked.T + (t["bias"] if bias else 0)
    norm = masked.square().sum()
    dx, dlogits = torch.autograd.grad((t["dy"] * y).sum() - COEF * norm, (x, logits))
    results = {"y": y.detach(), "dx": dx, "dlogits": dlogits, "norm": norm.detach()}
    outer = (
        torch.einsum("sbo,sbi->oi", t["dy"].abs(), x.detach().abs()) * t["weight"].abs()
        + 2 * COEF * t["weight"].square()
    )
    sizes = {
        "y": x.detach().abs() @ t["weight"].abs().T + 1,
        "dx": t["dy"].abs() @ t["weight"].abs(),
        "dlogits": KAPPA / TAU * outer.unflatten(1, (-1, PATTERN.m)).sum(2)[:, None],
        "norm": norm.detach(),
    }
    return results, sizes


def worst(
    found: dict[str, torch.Tensor], kind: str, bias: bool, **wrong: float
) -> dict[str, float]:
    """Largest error of each result in units of the size of its terms."""
    results, sizes = expected(kind, bias, **wrong)
    return {
        name: float(((found[name].double() - results[name]).abs() / sizes[name]).max())
        for name in results
    }


# fp32 rounds by 2^-24. Sums of 64 terms, over ranks in any order: at most 64 roundings of the
# terms' size. The relaxed index adds 8 roundings of a score below (kappa |pi| + 17) / tau = 21,
# twice where two entries of the index meet.
TOLERANCE = 2.0**-24 * (64 + 2 * 8 * 21)


@pytest.mark.parametrize(
    "tp",
    [1, 2, pytest.param(4, marks=pytest.mark.nightly), pytest.param(8, marks=pytest.mark.slow)],
)
def test_masked_linears_equal_the_unsharded_reference(tp: int) -> None:
    cases = [case for case in CASES if tp > 1 or not case.sequence_parallel]
    per_rank = run_ranks(run_linears, tp, tp, cases)
    for case, *ranks in zip(cases, *per_rank, strict=True):
        found = gather(case, ranks)
        errors = worst(found, case.kind, case.bias)
        assert max(errors.values()) < TOLERANCE, f"{case}: {errors}"
        mistakes: dict[str, dict[str, Any]] = {
            "noise": {"step": KEY.step + 1},
            "sign": {"sign": -1.0},
        }
        for name, wrong in mistakes.items():
            missed = [
                key
                for key, error in worst(found, case.kind, case.bias, **wrong).items()
                if error < 10 * TOLERANCE
            ]
            assert not missed, f"{case}: a wrong {name} would go unnoticed in {missed}"
        assert (
            worst(found, case.kind, not case.bias)["y"] > 10 * TOLERANCE
        )  # a bias that is dropped, or added where there is none
