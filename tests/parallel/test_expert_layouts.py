"""A mixture of experts learns the same masks, and is pruned with the same, at every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megamask.config import Config
from megamask.data.batches import BatchPlan
from megamask.learn.gumbel import GradientLearner
from megamask.learn.masked_model import build_masked_model
from megamask.oneshot.calibrate import HiddenStates, input_stats
from megamask.parallel.mesh import start
from megamask.prepare.run_inputs import LearnInputs
from tests.parallel.ranks import run_ranks
from tests.parallel.tiny import Chains, config_of, convert_rank, gather_logits, gather_masks
from tests.parity.variants import VARIANTS, Variant, make

pytestmark = [pytest.mark.slow, pytest.mark.nightly]
STEPS = 4
Tensors = dict[str, torch.Tensor]


def learn(rank: int, config: Config) -> tuple[Tensors, Tensors, Tensors]:
    """Mask logits and hard masks by HF name, and the sums of squares of the first layer's inputs by
    Megatron name.
    """
    with start(config) as mesh:
        masked = build_masked_model(LearnInputs(config), mesh)
        tokens_NS = torch.stack([Chains()[index]["tokens"] for index in range(4)])
        own = {name: one for name, one in masked.linears.items() if ".layers.0." in name}
        with torch.no_grad(), masked.switch.without_masks():
            states = HiddenStates(masked.model, tokens_NS, 2, mesh)
            with input_stats(own, False, mesh, config.parallel.sequence_parallel) as stats:
                states.feed(masked.model.decoder.layers[0], own.values())
        learner = GradientLearner(config, mesh, masked)
        section = config.learn
        plan = BatchPlan(Chains(), section.global_batch, section.micro_batch, mesh.dp, mesh.dp_rank)
        for step in range(STEPS):
            learner.step(step, plan)
        hard = {name: linear.hard_mask() for name, linear in masked.linears.items()}
        masks = gather_masks(hard, masked.arch, mesh)
        sums = {name: one.sum_square_I.clone() for name, one in stats.items()}
        return gather_logits(masked, mesh), masks, sums


def test_layouts_learn_the_same(tmp_path: Path) -> None:
    """Layouts add in fp32 in different orders; test_learning_layouts.py says where such tolerances
    come from.
    """
    plain = VARIANTS["qwen2_moe"]
    keys = {
        **plain.keys,
        "vocab_size": 512,
        "num_hidden_layers": 2,
        "shared_expert_intermediate_size": 48,
    }
    make(tmp_path / "hf", Variant(plain.model_type, keys, {}), 0)
    section = {"steps": STEPS, "method": "subset", "prior": {"mask": None}}
    run_ranks(convert_rank, 1, config_of(tmp_path, 1, section))
    one = run_ranks(learn, 1, config_of(tmp_path, 1, section))[0]
    for ranks, tp, split in ((2, 2, False), (2, 2, True), (2, 1, False)):
        config = config_of(tmp_path, tp, section, sequence_parallel=split)
        found = run_ranks(learn, ranks, config)[0]
        for name, logits in one[0].items():
            assert float((found[0][name] - logits).abs().max()) < 1e-4, (name, tp, split)
        same = sum(int((found[1][name] == mask).sum()) for name, mask in one[1].items())
        assert same >= 0.999 * sum(mask.numel() for mask in one[1].values())
        for name, sums in one[2].items():
            assert torch.allclose(found[2][name], sums, rtol=1e-4), (name, tp, split)
