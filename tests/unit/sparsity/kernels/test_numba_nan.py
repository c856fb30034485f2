"""A logit that is not finite must show: the step refuses a loss that is NaN, a finite mask would
hide it.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from megamask.sparsity.categorical import gumbel_softmax
from megamask.sparsity.categorical.categorical import CATEGORICAL
from megamask.sparsity.draw import Sample, Site
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement
from tests.unit.sparsity.samplers import FUSED


@pytest.mark.parametrize("backend", [gumbel_softmax, FUSED])
@pytest.mark.parametrize(
    "bad", [float("nan"), float("inf"), 1e38]
)  # 1e38 overflows when it is scaled
def test_a_bad_logit_spoils_its_group_and_no_other(backend: ModuleType, bad: float) -> None:
    site = Site(Pattern(2, 4), Placement.whole(8, 4), CATEGORICAL)
    logits, weight = torch.zeros(8, 6, 4), torch.ones(8, 16)
    logits[3, 2, 1] = bad
    masked, (norm, _), _ = backend.forward(
        logits, weight, site, Sample(NoiseKey(1, 2), kappa=100.0, tau=1.0)
    )
    spoiled = torch.zeros(8, 16, dtype=torch.bool)
    spoiled[3, 4:8] = True
    assert torch.equal(masked.isnan(), spoiled)
    assert norm.isnan()
