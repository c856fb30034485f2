"""What the jobs of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megamask.sparsity.categorical.categorical import CATEGORICAL
from megamask.sparsity.draw import Sample, Site
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement
from tests.parallel.tiny import make_run
from tests.unit.sparsity.samplers import FUSED


@pytest.fixture(scope="session", autouse=True)
def _compiled_kernels() -> None:
    """Compile the fused kernels once, before jobs of many processes would each do it: they are
    cached on disk.
    """
    site, draw = (
        Site(Pattern(2, 4), Placement.whole(1, 1), CATEGORICAL),
        Sample(NoiseKey(0, 0), 1.0, 1.0),
    )
    fp32, bf16 = torch.float32, torch.bfloat16
    for logits_dtype, weight_dtype in ((fp32, fp32), (fp32, bf16), (bf16, fp32)):
        logits = torch.zeros(1, 6, 1, dtype=logits_dtype)
        weight = torch.zeros(1, 4, dtype=weight_dtype)
        FUSED.forward(logits, weight, site, draw)
        FUSED.backward(weight, logits, weight, site, draw)
        FUSED.mask_statistics(logits, site, 1.0)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with Megatron weights of a tiny Llama and its magnitude masks. Read it, do
    not write into it.
    """
    return make_run(tmp_path_factory.mktemp("tiny"))
