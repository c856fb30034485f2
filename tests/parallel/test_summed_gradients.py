"""dW summed by Megatron's multiplies at TP 1 and 2, with sequence parallelism, against fp64.

Shapes: S sequence, B batch, O out_features, I in_features.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core.tensor_parallel import layers

from megamask.config import Config
from megamask.parallel import gradient_sum
from megamask.parallel.gradient_sum import APEX, SummingMultiply
from megamask.parallel.mask_context import MaskSwitch
from megamask.parallel.mesh import Mesh, start
from megamask.parallel.step_draw import StepDraws
from megamask.sparsity.categorical.categorical import CATEGORICAL
from megamask.sparsity.draw import Sample
from tests.parallel.ranks import run_ranks
from tests.parallel.test_masked_linears import (
    BATCH,
    COEF,
    KAPPA,
    KEY,
    PARAMETER,
    PATTERN,
    SEQUENCE,
    TAU,
    Case,
    join,
    make_linear,
    shard,
    tensors,
)

pytestmark = pytest.mark.slow
CASES = [
    Case(kind, bias=True, sequence_parallel=sequence_parallel)
    for kind in ("column", "gated", "row")
    for sequence_parallel in (False, True)
]
FACTORS = (1.0, -3.0, 0.5)  # of the output's gradient, one a micro-batch
# Sums of S B x 3 = 96 terms in fp32: 96 roundings of 2^-24 of their sizes at most.
TOLERANCE = 96 * 2.0**-24


def cases_at(tp: int) -> list[Case]:
    return [one for one in CASES if tp > 1 or not one.sequence_parallel]


def run_cases(rank: int, tp: int) -> list[torch.Tensor]:
    """The sum of dW (O, I) of this rank in every case; the multiply is ours."""
    setattr(layers, APEX, SummingMultiply)
    settings = Config.model_validate({"parallel": {"tp": tp, "threads": 1}})
    patched = patch.object(gradient_sum, "sums_in_multiply", return_value=True)
    with start(settings) as mesh, patched:
        return [run_case(case, mesh) for case in cases_at(tp)]


def run_case(case: Case, mesh: Mesh) -> torch.Tensor:
    whole, axis = tensors(case.kind), 1 if case.kind == "row" else 0
    linear: Any = make_linear(case)
    with torch.no_grad():
        linear.weight.copy_(shard(case.kind, whole["weight"], axis, mesh.tp_rank, mesh.tp))
        linear.bias.zero_()
    linear.requires_grad_(False)
    site = linear.make_site(PATTERN, case.kind, CATEGORICAL)
    linear.attach_logits(site, PARAMETER, MaskSwitch(), "numba")
    linear.mask_logits.main_grad = torch.empty_like(linear.mask_logits)
    x, dy = whole["x"], whole["dy"]
    if case.kind == "row":
        x = shard("row", x, 2, mesh.tp_rank, mesh.tp)
        dy = dy.chunk(mesh.tp)[mesh.tp_rank] if case.sequence_parallel else dy
    else:
        x = x.chunk(mesh.tp)[mesh.tp_rank] if case.sequence_parallel else x
        dy = shard(case.kind, dy.movedim(2, 0), 0, mesh.tp_rank, mesh.tp).movedim(0, 2)
    draws = StepDraws([linear])
    draws.begin(Sample(KEY, KAPPA, TAU), COEF, sums_in_fp32=True)
    for factor in FACTORS:
        y, _ = linear(x.clone().requires_grad_())
        y.backward(factor * dy.contiguous())
    assert linear.step_weight.grad is None
    assert list(draws.end()) == [0]
    draws.drop()
    assert bool(torch.isfinite(linear.mask_logits.main_grad).all())
    return draws.buffers[0]


@pytest.mark.parametrize("tp", [1, 2])
def test_multiplies_sum_what_is_due(tp: int) -> None:
    ranks = run_ranks(run_cases, tp, tp)
    for number, case in enumerate(cases_at(tp)):
        whole = tensors(case.kind)
        x, dy = (whole[name].double().reshape(SEQUENCE * BATCH, -1) for name in ("x", "dy"))
        sizes = sum(map(abs, FACTORS)) * (dy.abs().t() @ x.abs())
        found = join(case.kind, [one[number] for one in ranks], 1 if case.kind == "row" else 0)
        due, overwritten = (
            float(((found - factor * (dy.t() @ x)).abs() / sizes).max())
            for factor in (sum(FACTORS), FACTORS[-1])
        )
        assert due < TOLERANCE, case
        assert overwritten > 100 * TOLERANCE, case
