"""Checks of the Triton backend against the PyTorch one, run by test_triton.py: TRITON_INTERPRET
decides the device.

Shapes: O out_features, I in_features, G groups per row, C candidates.
"""

from __future__ import annotations

import os
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from megamask.sparsity.categorical import gumbel_softmax
from megamask.sparsity.categorical.categorical import CATEGORICAL
from megamask.sparsity.distribution import Distribution
from megamask.sparsity.draw import GradientSink, Sample, Site
from megamask.sparsity.kernels import triton_host, triton_tiles
from megamask.sparsity.noise import NoiseKey, words
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement, RowBlock
from megamask.sparsity.subset.subset import SUBSET
from tests.masks import is_valid
from tests.unit.sparsity.samplers import TRITON
from tests.unit.sparsity.test_backends import changed
from tests.unit.sparsity.test_noise import KNOWN_ANSWERS

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
ROWS, GROUPS = 4, 37  # GROUPS is no multiple of a tile
# Of the many cases. The interpreter takes as long for a row as for the row before.
FEW_ROWS = 2
KEY = NoiseKey(seed=2**32 - 1, step=2**31, micro_batch=5, parameter=2**32 - 7)
SOFT = Sample(KEY, kappa=100.0, tau=4.0)
DRAWS = [
    SOFT,
    Sample(KEY, kappa=500.0, tau=0.05),
    Sample(KEY, kappa=300.0, tau=1.0, hard=True),
]
SCALED = [
    Sample(KEY, kappa=300.0, tau=0.5, noise=0.5),
    Sample(KEY, kappa=300.0, tau=1.0, noise=0.0),
    Sample(KEY, kappa=300.0, tau=1.0, hard=True, noise=0.0),
]
SINK = GradientSink(norm_coef=1e-2)
# The interpreter takes seconds for the 70 candidates of 4:8, and for 16 positions.
AT_NIGHT = [pytest.mark.nightly] if DEVICE == "cpu" else []
EPS = 2.0**-24  # fp32 rounds to 24 bits
FP32, BF16 = torch.float32, torch.bfloat16


def problem(
    n: int, m: int, logits: torch.dtype = FP32, weight: torch.dtype = FP32, rows: int = ROWS
) -> tuple[Site, list[torch.Tensor]]:
    """Site of a gated shard; gradient (O, I), logits (O, C, G), weight (O, I)."""
    site = Site(
        Pattern(n, m), Placement.shard(rows, GROUPS, axis=0, rank=1, size=2, stride=2), CATEGORICAL
    )
    generator = torch.Generator().manual_seed(n * 10 + m)
    pi = 0.01 * torch.randn(rows, site.pattern.num_candidates, GROUPS, generator=generator)
    w, g = (torch.randn(rows, GROUPS * m, generator=generator) for _ in range(2))
    return site, [g.to(DEVICE, weight), pi.to(DEVICE, logits), w.to(DEVICE, weight)]


def index_error(logits: torch.Tensor, draw: Sample) -> float:
    """Largest difference to expect in the relaxed index.

    The scores are (kappa pi + g) / tau with |g| < 17, of about 8 roundings of the score's size. The
    hardware's log2 adds up to 2^-22 / log2(16/15) = 2.6e-6 to g where the series does not stand in,
    and its exp 2^-22. d softmax <= d score / 2 (twice: both sides).
    """
    largest = (draw.kappa * float(logits.float().abs().max()) + 17) / draw.tau
    return 8 * EPS * largest + (3e-6 / draw.tau + 2.0**-22 if DEVICE == "cuda" else 0.0)


def rounding(dtype: torch.dtype) -> float:
    """Two results that differ by less may still round to neighbours: 2^-7 apart in bf16."""
    return 2.0**-7 if dtype == BF16 else 4 * EPS


def gradient_error(logits: torch.Tensor, draw: Sample, n: int) -> float:
    """dpi = kappa / tau * y * (dy - mean dy): |dy| sums n products of size |dW W| < 25, y errs by
    index_error, dy by n roundings.
    """
    return draw.kappa / draw.tau * n * 25 * (4 * index_error(logits, draw) + 4 * n * EPS)


@triton.jit
def _words_kernel(out, group, c2, c3, k0, k1, OURS: tl.constexpr):
    group = tl.load(group + tl.arange(0, 4))
    if OURS:
        named = triton_tiles.counter(
            group, tl.load(c2).to(tl.uint32), tl.load(c3), tl.load(k0), tl.load(k1)
        )
        a, b, c, d = triton_tiles.word_block(named, 1)
    else:
        seed = tl.load(k1).to(tl.uint64) << 32 | tl.load(k0).to(tl.uint64)
        low, high = group.to(tl.uint32), ((group >> 32).to(tl.uint32) << 8) | 1
        a, b, c, d = tl.philox(
            seed, low, high, tl.load(c2).to(tl.uint32), tl.load(c3).to(tl.uint32)
        )
    line = out + tl.arange(0, 4)
    tl.store(line, a.to(tl.int64))
    tl.store(line + 4, b.to(tl.int64))
    tl.store(line + 8, c.to(tl.int64))
    tl.store(line + 12, d.to(tl.int64))


@triton.jit
def _known_kernel(out, counter, key):
    a, b, c, d = triton_tiles._philox(
        tl.load(counter).to(tl.uint32),
        tl.load(counter + 1).to(tl.uint32),
        tl.load(counter + 2).to(tl.uint32),
        tl.load(counter + 3).to(tl.uint32),
        tl.load(key).to(tl.uint32),
        tl.load(key + 1).to(tl.uint32),
    )
    tl.store(out, a.to(tl.int64))
    tl.store(out + 1, b.to(tl.int64))
    tl.store(out + 2, c.to(tl.int64))
    tl.store(out + 3, d.to(tl.int64))


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]
) -> None:
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    _known_kernel[(1,)](out, *(torch.tensor(part, device=DEVICE) for part in (counter, key)))
    assert tuple(out.tolist()) == answer


def test_words_have_the_layout_of_philox_py_and_of_tritons_own_generator() -> None:
    group = torch.tensor([0, 5, 2**32 - 1, 3 * 2**32 + 7], device=DEVICE)
    parts = [
        torch.tensor(part, device=DEVICE)
        for part in (KEY.parameter, KEY.micro_batch, KEY.seed, KEY.step)
    ]
    expected = words(KEY, group, 8)[4:]
    for ours in (True, False):
        out = torch.zeros(4, 4, dtype=torch.int64, device=DEVICE)
        _words_kernel[(1,)](out, group, *parts, OURS=ours)
        assert torch.equal(out, expected)


CASES = [  # pattern, dtype of logits, of weight and gradient, draw; the interpreter is slow
    *((2, 4, FP32, dtype, draw) for dtype in (FP32, BF16) for draw in DRAWS),
    *((2, 4, BF16, BF16, draw) for draw in (DRAWS[0], DRAWS[2])),
    *((2, 4, FP32, BF16, draw) for draw in SCALED[:2]),
    (4, 8, FP32, BF16, SCALED[1]),
    (1, 4, FP32, BF16, DRAWS[0]),
    (2, 3, BF16, BF16, DRAWS[2]),
    pytest.param(4, 8, BF16, BF16, DRAWS[2], marks=AT_NIGHT),
    pytest.param(4, 8, FP32, FP32, DRAWS[0], marks=AT_NIGHT),
]


@pytest.mark.parametrize(("n", "m", "logits", "weight", "draw"), CASES)
def test_the_kernels_equal_the_plain_backend(
    n: int, m: int, logits: torch.dtype, weight: torch.dtype, draw: Sample
) -> None:
    site, (grad, pi, w) = problem(n, m, logits, weight, FEW_ROWS)
    error = index_error(pi, draw)
    expected, found = (
        gumbel_softmax.forward(pi, w, site, draw, statistics=True),
        TRITON.forward(pi, w, site, draw, statistics=True),
    )
    assert found.masked.dtype == weight
    # A mask entry sums at most C index entries that err together (they sum to 1): twice the index
    # error, times |W| < 5.
    torch.testing.assert_close(
        found.masked, expected.masked, rtol=rounding(weight), atol=2 * error * 5
    )
    assert torch.equal(found.hard_codes, expected.hard_codes)
    # The largest probabilities sum C exp of differences below 2 kappa max|pi|.
    statistics_error = EPS * (
        4 * draw.kappa * float(pi.abs().max()) + 4 * site.pattern.num_candidates
    ) + (1e-6 if DEVICE == "cuda" else 0)
    torch.testing.assert_close(
        found.sums, expected.sums, rtol=max(4 * error + 1e-6, statistics_error), atol=0
    )
    hard_codes, largest = TRITON.mask_statistics(pi, site, draw.kappa)
    assert torch.equal(hard_codes, gumbel_softmax.mask_statistics(pi, site, draw.kappa)[0])
    torch.testing.assert_close(
        largest,
        gumbel_softmax.mask_statistics(pi, site, draw.kappa)[1],
        rtol=statistics_error,
        atol=0,
    )

    slack = gradient_error(pi, draw, n)
    expected_dlogits = gumbel_softmax.backward(grad, pi, w, site, draw, SINK)
    torch.testing.assert_close(
        TRITON.backward(grad, pi, w, site, draw, SINK),
        expected_dlogits,
        rtol=rounding(logits),
        atol=slack,
    )
    assert float(expected_dlogits.abs().max()) > 100 * slack or draw.tau == 0.05
    buffer = torch.randn(pi.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, logits)
    sink = replace(SINK, buffer=buffer)
    copy = replace(SINK, buffer=buffer.clone())
    expected_sum = gumbel_softmax.backward(grad, pi, w, site, draw, copy)
    assert TRITON.backward(grad, pi, w, site, draw, sink) is buffer
    torch.testing.assert_close(buffer, expected_sum, rtol=rounding(logits), atol=slack)


def test_gradients_and_buffers_of_another_dtype_or_stride() -> None:
    site, (grad, pi, w) = problem(2, 4, FP32, BF16)
    expected = gumbel_softmax.backward(grad.float(), pi, w, site, SOFT, SINK)
    slack = gradient_error(pi, SOFT, 2)
    odd = (
        torch.zeros(grad.numel() + 1, device=DEVICE, dtype=BF16)[1:].view_as(grad).copy_(grad)
    )  # starts between two words
    for one in (grad.float(), grad.T.contiguous().T, odd):
        torch.testing.assert_close(
            TRITON.backward(one, pi, w, site, SOFT, SINK), expected, rtol=0, atol=slack
        )
    buffer = torch.zeros(pi.transpose(0, 2).shape, device=DEVICE, dtype=BF16).transpose(0, 2)
    TRITON.backward(grad, pi, w, site, SOFT, replace(SINK, buffer=buffer))
    # one rounding to bf16
    torch.testing.assert_close(buffer.float(), expected, rtol=2.0**-8, atol=slack)


@pytest.mark.parametrize(
    "change",
    [
        {"kappa": -100.0},
        {"kappa": 1.0},
        {"tau": 1.0},
        {"noise": 0.9},
        {"noise": 0.0},
        {"hard": True},
        {"norm_coef": 0.0},
        {"key": replace(KEY, step=1)},
    ],
    ids=str,
)
def test_a_wrong_kernel_would_be_seen(change: dict[str, Any]) -> None:
    site, (grad, pi, w) = problem(2, 4)
    wrong = changed(SOFT, SINK, change)
    expected = gumbel_softmax.backward(grad, pi, w, site, SOFT, SINK)
    # ``hard`` shows in the gradient through the norm term alone.
    assert (
        TRITON.backward(grad, pi, w, site, *wrong) - expected
    ).abs().max() > 10 * gradient_error(pi, SOFT, 2)


def test_hard_masks_differ_only_at_near_ties() -> None:
    site, (_, pi, w) = problem(2, 4)
    draw = Sample(KEY, 100.0, 1.0, hard=True)
    plain, fused = (
        backend.forward(pi, torch.ones_like(w), site, draw).masked
        for backend in (gumbel_softmax, TRITON)
    )
    assert is_valid(site.pattern, fused)
    top = gumbel_softmax.soft_index(pi, site, draw).topk(2, dim=1).values
    clear = (top[:, 0] - top[:, 1] > 4 * index_error(pi, draw)).repeat_interleave(4, dim=1)
    assert torch.equal(plain[clear], fused[clear])
    assert float(clear.float().mean()) > 0.99


@pytest.mark.parametrize("hard", [False, True])
def test_a_shard_has_the_bits_of_the_whole(hard: bool) -> None:
    _, (grad, pi, w) = problem(2, 4, FP32, BF16)
    pattern, draw = Pattern(2, 4), replace(SOFT, hard=hard)
    # Its group ids pass 2^32 within a row.
    place = Placement((RowBlock(0, ROWS, 2**32 // GROUPS - 2),), 0, GROUPS)
    whole, gradient = (
        TRITON.forward(pi, w, Site(pattern, place, CATEGORICAL), draw, statistics=True),
        TRITON.backward(grad, pi, w, Site(pattern, place, CATEGORICAL), draw, SINK),
    )
    expected = gumbel_softmax.forward(pi, w, Site(pattern, place, CATEGORICAL), draw).masked
    torch.testing.assert_close(
        whole.masked, expected, rtol=2.0**-7, atol=10 * index_error(pi, draw)
    )
    first = place.blocks[0].global_start
    shards: dict[str, tuple[Any, slice, Placement]] = {
        "columns": (slice(None), slice(3, 14), replace(place, first_group=3)),
        "gate and up": (
            [1, 3],
            slice(None),
            replace(place, blocks=(RowBlock(0, 1, first + 1), RowBlock(1, 1, first + 3))),
        ),
    }
    for rows, groups, where in shards.values():
        inputs = slice(4 * (groups.start or 0), None if groups.stop is None else 4 * groups.stop)
        some = (pi[rows][..., groups], w[rows][:, inputs], Site(pattern, where, CATEGORICAL), draw)
        part = TRITON.forward(*some, statistics=True)
        assert torch.equal(part.masked, whole.masked[rows][:, inputs])
        assert torch.equal(part.hard_codes, whole.hard_codes[rows][:, groups])
        assert torch.equal(
            TRITON.backward(grad[rows][:, inputs], *some, SINK), gradient[rows][..., groups]
        )


@pytest.mark.parametrize("distribution", [CATEGORICAL, SUBSET], ids=str)
def test_without_noise_neither_key_nor_place_matters(distribution: Distribution) -> None:
    site, (grad, _, w) = problem(2, 4, FP32, BF16)
    site = replace(site, distribution=distribution)
    generator = torch.Generator().manual_seed(3)
    shape = (ROWS, site.logits_per_group, GROUPS)
    pi = (0.01 * torch.randn(shape, generator=generator)).to(DEVICE)

    def bits(site: Site, draw: Sample, part: slice) -> list[torch.Tensor]:
        inputs = slice(4 * part.start, 4 * part.stop)
        some = (pi[..., part], w[:, inputs], site, draw)
        forward, backward = TRITON.forward(*some), TRITON.backward(grad[:, inputs], *some, SINK)
        return [forward.masked, backward]

    quiet, here = replace(SOFT, noise=0.0), slice(3, 14)
    masked, gradient = bits(site, quiet, slice(0, GROUPS))
    elsewhere = replace(site, placement=Placement.whole(ROWS, 11))
    other = replace(quiet, key=NoiseKey(8, 9))
    found = bits(elsewhere, other, here)
    assert torch.equal(found[0], masked[:, 12:56]) and torch.equal(found[1], gradient[..., here])
    loud = bits(elsewhere, replace(other, noise=1e-3), here)
    assert not torch.equal(loud[0], found[0])


@pytest.mark.parametrize("distribution", [CATEGORICAL, SUBSET], ids=str)
def test_tiles_of_a_program_have_the_bits_of_tiles_side_by_side(
    distribution: Distribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large layers give a program several tiles, or a thread several groups. Six tiles of 70
    groups wrap to the next rows within a program, and leave the second program half full.
    """
    kernels = import_module(str(distribution.triton))
    rows, groups = 8, 70
    site = Site(Pattern(2, 4), Placement.whole(rows, groups), distribution)
    generator = torch.Generator().manual_seed(1)
    pi = 0.01 * torch.randn(rows, site.logits_per_group, groups, generator=generator)
    w, g = (torch.randn(rows, groups * 4, generator=generator) for _ in range(2))
    g, pi, w = (one.to(DEVICE) for one in (g, pi, w))

    def run() -> list[torch.Tensor]:
        sampler = triton_host.TritonSampler(kernels)
        forward = sampler.forward(pi, w, site, SOFT, statistics=True)
        backward = sampler.backward(g, pi, w, site, SOFT, SINK)
        return [forward.masked, forward.hard_codes, backward, *forward.sums[None]]

    several = kernels.kernels_of(site.pattern, torch.device(DEVICE)).groups_a_thread
    assert several == 4 and triton_host.Cut.of(rows, groups, several).tiles == 1
    *expected, sums = run()
    monkeypatch.setattr(triton_host, "MANY_GROUPS", 0)
    for held, programs in ((several, 3), (1, 2)):
        if held == 1:
            monkeypatch.setattr(kernels, "FEW", 0)  # one group a thread, and several tiles
        assert triton_host.Cut.of(rows, groups, held).programs(rows) == programs
        *found, found_sums = run()
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        # fp32 sums of a tile each, added in another order
        torch.testing.assert_close(found_sums, sums, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("n", "m"), [(2, 4), pytest.param(4, 8, marks=AT_NIGHT)])
@pytest.mark.parametrize("hard", [False, True])
def test_a_bad_logit_spoils_its_group_and_no_other(n: int, m: int, hard: bool) -> None:
    site, groups = Site(Pattern(n, m), Placement.whole(8, 8), CATEGORICAL), [(0, 1), (3, 2), (5, 5)]
    logits, weight = (
        torch.zeros(8, site.pattern.num_candidates, 8, device=DEVICE),
        torch.ones(8, 8 * m, device=DEVICE),
    )
    spoiled = torch.zeros(8, 8, dtype=torch.bool, device=DEVICE)
    for (row, group), bad in zip(
        groups, (float("nan"), float("inf"), 1e38), strict=True
    ):  # 1e38 overflows when it is scaled
        logits[row, 2, group] = bad
        spoiled[row, group] = True
    draw = Sample(NoiseKey(1, 2), kappa=100.0, tau=1.0, hard=hard)
    masked, (norm, _), _ = TRITON.forward(logits, weight, site, draw)
    assert torch.equal(masked.isnan(), spoiled.repeat_interleave(m, 1))
    assert norm.isnan()
    assert torch.equal(TRITON.backward(weight, logits, weight, site, draw).isnan().any(1), spoiled)


def test_hard_masks_are_drawn_with_probability_softmax_of_kappa_pi() -> None:
    count, kappa = 2_000, 100.0
    pi = torch.tensor([0.012, -0.004, 0.0, 0.009, -0.015, 0.003], device=DEVICE)
    site = Site(Pattern(2, 4), Placement.whole(1, count), CATEGORICAL)
    expected = count * (kappa * pi.double()).softmax(0)

    def chi_square(kappa: float) -> float:
        draw = Sample(NoiseKey(seed=99, step=1), kappa, 0.7, hard=True)
        masked = TRITON.forward(
            pi[None, :, None].repeat(1, 1, count),
            torch.ones(1, 4 * count, device=DEVICE),
            site,
            draw,
        ).masked
        return float(
            (
                (
                    torch.bincount(site.pattern.index_of(masked).flatten(), minlength=6) - expected
                ).square()
                / expected
            ).sum()
        )

    assert chi_square(kappa) < 35.9  # P(chi-square of 5 degrees of freedom > 35.9) = 1e-6
    assert chi_square(-kappa) > 100
