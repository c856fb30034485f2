"""Checks of MaskPro's Triton kernel against plain PyTorch, run by
tests/unit/sparsity/kernels/test_triton.py: TRITON_INTERPRET decides the device.

Shapes: O out_features, G groups per row, M group size, N drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from megamask.learn.maskpro import score, score_triton
from megamask.learn.maskpro.score import choose_score, sample_of
from megamask.sparsity.draw import Site
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement
from megamask.sparsity.subset.subset import SUBSET
from megamask.sparsity.subset.triton_polynomials import ranks_of
from tests.unit.sparsity.kernels.triton_checks import AT_NIGHT, DEVICE
from tests.unit.sparsity.samplers import TRITON

KEY = NoiseKey(seed=2**32 - 3, step=2**31, micro_batch=9, parameter=2**32 - 7)
COEFFICIENTS = [0.5, -1.0, 2.0]
# fp32 roundings of scores up to N and of logits up to 12, as in test_score.py; the hardware's exp
# errs by up to 37 units of the last place at 30 nats, each score is a sum of quotients of them.
ALLOWED = 5e-6 if DEVICE == "cpu" else 5e-5


def problem(n: int, m: int, rows: int = 2, groups: int = 37) -> tuple[Site, torch.Tensor]:
    """The site of a gated shard, and its logits (O, M, G)."""
    place = Placement.shard(rows, groups, axis=0, rank=1, size=2, stride=2)
    logits = 3 * torch.randn(rows, m, groups, generator=torch.Generator().manual_seed(1))
    return Site(Pattern(n, m), place, SUBSET), logits.to(DEVICE)


def moved(
    logits: torch.Tensor, site: Site, kind: str, key: NoiseKey, coefficients: Sequence[float]
) -> torch.Tensor:
    found = logits.clone()
    score_triton.add_scores(found, site, key, coefficients, kind)
    return found


CASES = [
    (2, 4, "set"),
    (2, 4, "ordered"),
    (4, 8, "set"),
    pytest.param(1, 4, "set", marks=AT_NIGHT),
    pytest.param(3, 4, "set", marks=AT_NIGHT),
    pytest.param(5, 6, "ordered", marks=AT_NIGHT),
    pytest.param(8, 16, "ordered", marks=AT_NIGHT),
    pytest.param(2, 16, "set", marks=AT_NIGHT),
]


@pytest.mark.parametrize(("n", "m", "kind"), CASES)
def test_the_kernel_adds_what_the_reference_adds(n: int, m: int, kind: str) -> None:
    site, logits = problem(n, m)
    found = moved(logits, site, kind, KEY, COEFFICIENTS)
    expected = logits.double()
    score.add_scores(expected, site, KEY, COEFFICIENTS, kind)
    assert float((found - expected).abs().max()) < ALLOWED
    assert float((found - logits).abs().mean()) > 0.1


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 1}, {"parameter": 1}], ids=str)
def test_another_draw_would_be_seen(change: dict[str, int]) -> None:
    site, logits = problem(2, 4)
    expected = logits.double()
    score.add_scores(expected, site, KEY, [1.0], "set")
    other = moved(logits, site, "set", replace(KEY, **change), [1.0])
    assert float((other - expected).abs().max()) > 0.1


@pytest.mark.parametrize(("n", "kind"), [(2, "set"), (1, "ordered")])
def test_the_score_is_that_of_the_mask_of_the_forward_pass(n: int, kind: str) -> None:
    """The score of a position is above 0 where it is drawn, and below 0 elsewhere."""
    site, logits = problem(n, 4)
    for number in range(2):
        coefficients = [float(one == number) for one in range(number + 1)]
        change = moved(logits, site, kind, KEY, coefficients) - logits
        weight = torch.ones(logits.shape[0], 4 * logits.shape[2], device=DEVICE)
        sample = sample_of(replace(KEY, micro_batch=number))
        mask = TRITON.forward(logits, weight, site, sample).masked
        drawn = mask.unflatten(1, (-1, 4)).transpose(1, 2) > 0
        clear = change.abs() > 1e-6  # a position that is nearly certain has a score of nearly 0
        assert float(clear.float().mean()) > 0.9
        assert torch.equal(change[clear] > 0, drawn[clear])


@pytest.mark.parametrize(("n", "kind"), [(2, "set"), pytest.param(2, "ordered", marks=AT_NIGHT)])
def test_stable_where_a_mask_is_nearly_certain(n: int, kind: str) -> None:
    """Gaps at which exp would overflow fp32 (88), and members that win against all odds."""
    m = 2 * n
    site, logits = problem(n, m)
    kept = (torch.arange(m, device=DEVICE) < n).view(1, m, 1)
    for gap in (19.0, 300.0):
        start = logits / 3 + gap * kept
        found, expected = moved(start, site, kind, KEY, [1.0]), start.double()
        score.add_scores(expected, site, KEY, [1.0], kind)
        # roundings of the logits, which scores of up to 2 N see, and of their sum with a score
        allowed = (2 * n + 1) * gap * 2.0**-24 + ALLOWED
        assert float((found - expected).abs().max()) < allowed


def test_a_shard_has_the_bits_of_the_whole() -> None:
    logits = problem(2, 4, 2, 48)[1]
    pattern, whole = Pattern(2, 4), Site(Pattern(2, 4), Placement.whole(2, 48), SUBSET)
    expected = moved(logits, whole, "set", KEY, COEFFICIENTS)
    for axis, dim in ((0, 0), (1, 2)):
        parts = []
        for rank, part in enumerate(logits.chunk(2, dim)):
            rows, _, groups = part.shape
            place = Placement.shard(rows, groups, axis=axis, rank=rank, size=2)
            site = Site(pattern, place, SUBSET)
            parts.append(moved(part.contiguous(), site, "set", KEY, COEFFICIENTS))
        assert torch.equal(torch.cat(parts, dim), expected)


@pytest.mark.parametrize("kind", ["set", pytest.param("ordered", marks=AT_NIGHT)])
def test_a_bad_logit_spoils_its_group_and_no_other(kind: str) -> None:
    site, logits = problem(2, 4)
    bad = torch.zeros_like(logits, dtype=torch.bool)
    for row, position, group, value in ((0, 1, 3, float("nan")), (1, 2, 36, float("inf"))):
        logits[row, position, group] = value
        bad[row, :, group] = True
    assert torch.equal(moved(logits, site, kind, KEY, [1.0]).isnan(), bad)


@triton.jit
def late_ranks(values, M: tl.constexpr):
    """The wrong mask: every position has the rank of the one before."""
    ranks = ranks_of(values, M)
    return (ranks[M - 1], *ranks[: M - 1])


@pytest.mark.parametrize("kind", [pytest.param(one, marks=AT_NIGHT) for one in ("set", "ordered")])
def test_the_check_before_a_run_knows_the_kernel(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is content with the kernel, and sees another rate, and (in the interpreter, since a
    compiled kernel keeps the helpers that it met) another mask.
    """
    # Megatron-Core, which the other checks of Triton kernels do not load
    from megamask.config.load import load_config
    from megamask.learn.kernel_check import GROUPS, ROWS, update_problem

    words = ["learn.preset=maskpro", "learn.method=maskpro", f"learn.maskpro.score={kind}"]
    config, site = (
        load_config(None, words),
        Site(Pattern(2, 4), Placement.whole(ROWS, GROUPS), SUBSET),
    )
    assert choose_score(kind, site.pattern) == kind

    def problem_now() -> str:
        return update_problem(config, site, torch.device(DEVICE), "triton")

    assert problem_now() == ""
    true = score_triton.add_scores

    def other_rate(logits: Any, site: Any, key: Any, coefficients: Any, kind: str) -> None:
        true(logits, site, key, [1.01 * one for one in coefficients], kind)

    with monkeypatch.context() as changed:
        changed.setattr(score_triton, "add_scores", other_rate)
        assert problem_now().startswith("the update of maskpro: ")
    if DEVICE == "cpu":
        monkeypatch.setattr(score_triton, "ranks_of", late_ranks)
        assert problem_now().startswith("the update of maskpro: ")
