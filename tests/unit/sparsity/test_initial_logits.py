"""Initial logits: keyed normal noise, and the pull of a prior mask (MaskLLM, Eq. 9 and 10) by brute
force.

Shapes: O out_features, I in_features, G groups per row, C candidates.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megamask.config.load import load_config
from megamask.learn import masked_model
from megamask.sparsity import initial_logits
from megamask.sparsity.categorical.categorical import CATEGORICAL, similarity
from megamask.sparsity.draw import Site
from megamask.sparsity.initial_logits import initial_noise
from megamask.sparsity.noise import INITIAL_STEP, NoiseKey, uniform, words
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement
from tests.unit.sparsity.categorical.reference import candidate_table

PATTERNS = [(2, 4), (1, 4), (4, 8)]


def site_of(n: int, m: int, rows: int, groups: int) -> Site:
    return Site(Pattern(n, m), Placement.whole(rows, groups), CATEGORICAL)


def some_mask(n: int, m: int, rows: int, groups: int) -> torch.Tensor:
    return Pattern(n, m).best(
        torch.rand(rows, groups * m, generator=torch.Generator().manual_seed(3))
    )


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_similarity_is_the_overlap_minus_its_mean_over_candidates(n: int, m: int) -> None:
    mask, table = some_mask(n, m, 3, 4), candidate_table(n, m)
    sim = similarity(mask, Pattern(n, m))
    for o in range(3):
        for g in range(4):
            overlap = [
                float(mask[o, g * m : (g + 1) * m].double() @ candidate) for candidate in table
            ]
            mean = sum(overlap) / len(overlap)
            assert sim[o, :, g].tolist() == pytest.approx(
                [one - mean for one in overlap], abs=1e-6
            )  # fp32 of numbers below 8
    assert sim.mean(1).abs().max() < 1e-6
    assert float(sim.amax(1).min()) == pytest.approx(
        n - n * n / m
    )  # each group's largest is that of the prior itself


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_the_prior_wins_without_noise_and_with_small_noise(n: int, m: int) -> None:
    site, mask = site_of(n, m, 16, 32), some_mask(n, m, 16, 32)
    bonus = CATEGORICAL.prior_bonus(mask, site.pattern, strength=3.0, std=0.01)
    assert torch.equal(site.pattern.mask_of(bonus.argmax(1)), mask)
    assert not torch.equal(site.pattern.mask_of((-bonus).argmax(1)), mask)
    # alpha = 3 lifts the prior 3 std above the nearest other; noise of one std overturns few
    # groups, of ten std most.
    hard_codes = (bonus + initial_noise(site, 32, 0.01, seed=1, parameter=2)).argmax(1)
    assert 0.5 < float((hard_codes == site.pattern.index_of(mask)).float().mean()) < 1
    loud = (bonus + initial_noise(site, 32, 0.1, seed=1, parameter=2)).argmax(1)
    assert float((loud == site.pattern.index_of(mask)).float().mean()) < 0.5


def test_the_bonus_is_std_times_similarity_times_strength() -> None:
    site, mask = site_of(2, 4, 5, 6), some_mask(2, 4, 5, 6)
    torch.testing.assert_close(
        CATEGORICAL.prior_bonus(mask, site.pattern, 3.0, 0.02),
        0.06 * similarity(mask, site.pattern),
    )
    assert float(CATEGORICAL.prior_bonus(mask, site.pattern, 0.0, 0.02).abs().max()) == 0


def test_the_initial_noise_is_normal() -> None:
    noise = initial_noise(site_of(2, 4, 200, 200), 200, 0.01, seed=5, parameter=6).double()
    count = noise.numel()  # 2.4e5
    # Standard errors of mean, std and fourth moment of a normal sample, five of each.
    assert abs(float(noise.mean())) < 5 * 0.01 / count**0.5
    assert abs(float(noise.std()) / 0.01 - 1) < 5 / (2 * count) ** 0.5
    assert abs(float((noise / 0.01).pow(4).mean()) - 3) < 5 * (96 / count) ** 0.5
    per_candidate = noise.transpose(0, 1).flatten(1)
    correlation = torch.corrcoef(per_candidate) - torch.eye(6)
    assert float(correlation.abs().max()) < 5 / per_candidate.shape[1] ** 0.5


def test_tiles_of_initial_noise_have_the_bits_of_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the tile leaves over for vectors of the processor: 37 groups a row, 3 rows a tile,
    and 2 rows at the end.
    """
    site = site_of(4, 8, 20, 37)
    count = site.logits_per_group
    word = words(NoiseKey(5, INITIAL_STEP, 0, 6), site.placement.group_ids(37), 2 * count)
    radius = (-2 * uniform(word[:count]).double().log()).sqrt()
    angle = 2 * math.pi * uniform(word[count:]).double()
    scale = 0.01 * CATEGORICAL.noise_unit(site.pattern)
    whole = (scale * radius * angle.cos()).float().transpose(0, 1)
    for tile in (1, 37 * 3 + 36, 1 << 20):
        monkeypatch.setitem(initial_logits.TILES, "cpu", tile)
        assert torch.equal(initial_noise(site, 37, 0.01, seed=5, parameter=6), whole)


def test_the_noise_of_a_layer_is_made_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of the host among the operands would be refused."""
    made: list[torch.Tensor] = []

    def noise(*given: Any) -> torch.Tensor:
        made.append(initial_noise(*given))
        return made[-1]

    monkeypatch.setattr(masked_model, "initial_noise", noise)
    monkeypatch.setattr(masked_model, "_layer_std", lambda *_: 0.01)
    site, there = site_of(2, 4, 16, 8), torch.device("meta")
    logits = torch.empty(16, 6, 8, dtype=torch.bfloat16, device=there)
    linear: Any = SimpleNamespace(site=site, mask_logits=logits, parameter_id=6)
    config = load_config(None, ["learn.preset=maskllm"])
    masked_model._initialise(linear, config, None, some_mask(2, 4, 16, 8))  # type: ignore[arg-type]
    assert [one.device for one in made] == [there] and made[0].shape == (16, 6, 8)


def test_the_initial_noise_is_keyed_by_seed_parameter_and_global_group() -> None:
    whole = initial_noise(site_of(2, 4, 16, 8), 8, 0.01, seed=5, parameter=6)
    assert whole.is_contiguous()
    for rank in range(2):
        row = Site(Pattern(2, 4), Placement.shard(16, 4, axis=1, rank=rank, size=2), CATEGORICAL)
        assert torch.equal(initial_noise(row, 4, 0.01, 5, 6), whole[..., 4 * rank : 4 * rank + 4])
        column = Site(Pattern(2, 4), Placement.shard(8, 8, axis=0, rank=rank, size=2), CATEGORICAL)
        assert torch.equal(initial_noise(column, 8, 0.01, 5, 6), whole[8 * rank : 8 * rank + 8])
    assert not torch.equal(initial_noise(site_of(2, 4, 16, 8), 8, 0.01, seed=6, parameter=6), whole)
    assert not torch.equal(initial_noise(site_of(2, 4, 16, 8), 8, 0.01, seed=5, parameter=7), whole)
