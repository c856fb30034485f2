"""Sampled masks and initial logits are bit-identical in every layout, and after resharding.

Shapes: O out_features, I in_features, G groups per row, C candidates.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megamask.config import Config
from megamask.data.batches import BatchPlan
from megamask.learn.gumbel import GradientLearner
from megamask.learn.masked_model import MaskedModel, build_masked_model
from megamask.masks.file import load_masks
from megamask.model.checkpoint import load_sharded, save_sharded, sharded_state
from megamask.parallel.mask_context import RunningSample
from megamask.parallel.mesh import Mesh, start
from megamask.prepare.run_inputs import LearnInputs
from megamask.sparsity.categorical.categorical import CATEGORICAL
from megamask.sparsity.draw import Sample
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.operator import sampler_for
from megamask.sparsity.shard import Placement
from tests.parallel.ranks import meet_again, run_ranks
from tests.parallel.tiny import TPS, Chains, config_of, gather_hf, gather_logits, logits_of

pytestmark = pytest.mark.slow
Tensors = dict[str, torch.Tensor]
DRAWS = {
    "soft": Sample(NoiseKey(1234, 7, 3), kappa=100.0, tau=4.0),
    "cold": Sample(NoiseKey(1234, 7, 3), kappa=500.0, tau=0.05),
    "hard": Sample(NoiseKey(1234, 7, 3), kappa=300.0, tau=1.0, hard=True),
}
SAVED_AT = 2
OTHERS = [tp for tp in TPS if tp != SAVED_AT]


# --- one job a TP size: everything that is compared


def look(rank: int, config: Config, folder: Path) -> dict[str, Tensors]:
    """Initial logits, masks and gradients of all draws by both backends, logits through a
    checkpoint written at TP 2.
    """
    with start(config) as mesh:
        masked_model = build_masked_model(LearnInputs(config), mesh)
        found = {"initial": gather_logits(masked_model, mesh)}
        for backend in ("torch", "numba"):
            for linear in masked_model.linears.values():
                linear.sampler = sampler_for(backend, CATEGORICAL)
            for name, drawn in DRAWS.items():
                masked_model.switch.running = RunningSample(drawn, norm_coef=1e-3)
                found[f"{backend} {name} masks"], found[f"{backend} {name} gradients"] = sample(
                    masked_model, mesh
                )
        if mesh.tp == SAVED_AT:
            found["misplaced"] = sample_misplaced(masked_model, mesh)
        masked_model.switch.running = RunningSample(DRAWS["soft"], norm_coef=1e-3)
        through_checkpoint(masked_model, mesh, folder)
        found["reloaded"], (found["reloaded masks"], _) = (
            gather_logits(masked_model, mesh),
            sample(masked_model, mesh),
        )
        return found if rank == 0 else {}


def sample(masked_model: MaskedModel, mesh: Mesh) -> tuple[Tensors, Tensors]:
    """Masks (O, I) and gradients at the logits (O, C, G) of the draw that is set, whole, by HF
    module name.
    """
    masks: Tensors = {}
    gradients: Tensors = {}
    for name, linear in masked_model.linears.items():
        masks[name] = linear.masked_weight(torch.ones_like(linear.weight)).detach()
        logits = logits_of(linear)
        logits.grad = None
        linear.masked_weight(linear.weight).backward(linear.weight + 1)
        assert logits.grad is not None
        gradients[name] = logits.grad
    return gather_hf(masks, masked_model, mesh), gather_hf(gradients, masked_model, mesh)


def sample_misplaced(masked_model: MaskedModel, mesh: Mesh) -> Tensors:
    """Masks when a rank takes its local group numbers for global ones: what the comparison must
    notice.
    """
    right = {name: linear.site for name, linear in masked_model.linears.items()}
    for linear in masked_model.linears.values():
        linear.site = replace(
            linear.site,
            placement=Placement.whole(linear.weight.shape[0], logits_of(linear).shape[-1]),
        )
    masks, _ = sample(masked_model, mesh)
    for name, linear in masked_model.linears.items():
        linear.site = right[name]
    return masks


def through_checkpoint(masked_model: MaskedModel, mesh: Mesh, folder: Path) -> None:
    """Put recognisable logits into a checkpoint at TP 2, read them at any TP."""
    logits = {
        key: value
        for key, value in sharded_state(masked_model.model).items()
        if key.endswith(".mask_logits")
    }
    if mesh.tp == SAVED_AT:
        with torch.no_grad():
            for number, linear in enumerate(masked_model.linears.values()):
                logits_of(linear).mul_(1.25 + number)
        save_sharded(logits, folder, mesh, {})
    else:
        for linear in masked_model.linears.values():
            logits_of(linear).data.fill_(torch.nan)
        masked_model.model.load_state_dict(load_sharded(logits, folder, ""), strict=False)


@pytest.fixture(scope="module")
def by_tp(
    tiny_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, Tensors]]:
    folder = tmp_path_factory.mktemp("logits") / "saved"
    learn = {"prior": {"margins": True}}  # so that the start depends on each weight's margin
    return {
        tp: run_ranks(look, tp, config_of(tiny_run, tp, learn), folder)[0]
        for tp in (SAVED_AT, *OTHERS)
    }


def assert_same_bits(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, different


@pytest.mark.parametrize("tp", TPS[1:])
def test_masks_and_gradients_have_the_same_bits_at_every_tp(
    by_tp: dict[int, dict[str, Tensors]], tp: int
) -> None:
    for what in (key for key in by_tp[1] if key.startswith(("torch", "numba"))):
        assert_same_bits(by_tp[tp][what], by_tp[1][what])


def test_local_group_numbers_would_be_seen(by_tp: dict[int, dict[str, Tensors]]) -> None:
    right, wrong = by_tp[1]["numba hard masks"], by_tp[SAVED_AT]["misplaced"]
    assert not any(torch.equal(wrong[name], right[name]) for name in right)


def test_the_draws_are_not_trivially_equal(by_tp: dict[int, dict[str, Tensors]]) -> None:
    masks, linear = by_tp[1], "model.layers.0.mlp.gate_proj"
    assert not torch.equal(masks["numba soft masks"][linear], masks["numba cold masks"][linear])
    up = linear.replace("gate", "up")  # rows of the gate and up rows draw different noise
    assert not torch.equal(masks["numba hard masks"][linear], masks["numba hard masks"][up])
    other_layer = linear.replace("layers.0", "layers.1")
    assert not torch.equal(
        masks["numba hard masks"][linear], masks["numba hard masks"][other_layer]
    )


@pytest.mark.parametrize("tp", TPS[1:])
def test_initial_logits_have_the_same_bits_at_every_tp(
    by_tp: dict[int, dict[str, Tensors]], tp: int
) -> None:
    assert_same_bits(by_tp[tp]["initial"], by_tp[1]["initial"])


def initial_of(rank: int, configs: list[Config]) -> list[Tensors]:
    found = []
    for config in configs:
        with start(config) as mesh:
            found.append(gather_logits(build_masked_model(LearnInputs(config), mesh), mesh))
        meet_again()
    return found


def test_a_run_starts_at_the_margins_of_its_prior(tiny_run: Path) -> None:
    """The start of subset is alpha x std times 1/2 +- half the margin, at most 2 medians, less its
    mean over the group; a candidate of categorical has the sum of its positions.
    """
    plain = {"sampling": {"initial_noise": False}, "prior": {"margins": True}}
    configs = [
        config_of(tiny_run, 2, {**plain, "method": one}) for one in ("subset", "categorical")
    ]
    subset, categorical = run_ranks(initial_of, 2, configs)[0]
    masks = load_masks(tiny_run / "masks" / "magnitude.safetensors")
    margins, differs = masks.margins(), False
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    for name in subset:
        kept, margin = (one[name].unflatten(1, (-1, 4)).transpose(1, 2) for one in (masks, margins))
        degree = 0.5 + torch.where(kept, 0.5, -0.5) * margin.clamp(max=2)
        expected = 3 * 0.01 * (degree - degree.mean(1, keepdim=True))
        # fp32 rounding of values up to 0.06
        assert torch.allclose(subset[name], expected, rtol=0, atol=1e-8)
        sums = 3 * 0.01 * torch.stack([degree[:, i] + degree[:, j] for i, j in pairs], 1)
        centred = sums - sums.mean(1, keepdim=True)
        assert torch.allclose(categorical[name], centred, rtol=0, atol=3e-8)
        alike = 3 * 0.01 * (kept.float() - 0.5)  # one gap for all
        differs |= not torch.allclose(subset[name], alike, rtol=0, atol=1e-3)
    assert differs


@pytest.mark.parametrize("tp", OTHERS)
def test_logits_saved_at_tp_2_are_the_same_at_every_tp(
    by_tp: dict[int, dict[str, Tensors]], tp: int
) -> None:
    assert_same_bits(by_tp[tp]["reloaded"], by_tp[SAVED_AT]["reloaded"])
    assert_same_bits(by_tp[tp]["reloaded masks"], by_tp[SAVED_AT]["reloaded masks"])
    assert not torch.equal(
        *(by_tp[tp][what]["model.layers.0.mlp.gate_proj"] for what in ("initial", "reloaded"))
    )


# --- splits of the same global batch into replicas and accumulations


def draws_of_a_step(rank: int, configs: list[Config]) -> list[dict[int, dict[str, Any]]]:
    """Every micro-batch of step 3 that this replica runs in each layout: its tokens and the masks
    sampled for it, on TP rank 0.
    """
    found = []
    for config in configs:
        found.append(draws_of_one(config))
        meet_again()
    return found


def draws_of_one(config: Config) -> dict[int, dict[str, Any]]:
    with start(config) as mesh:
        masked_model = build_masked_model(LearnInputs(config), mesh)
        seen: dict[int, dict[str, Any]] = {}
        learner = GradientLearner(config, mesh, masked_model)
        learn = config.learn
        plan = BatchPlan(Chains(), learn.global_batch, learn.micro_batch, mesh.dp, mesh.dp_rank)
        masked_model.model.register_forward_pre_hook(
            lambda module, args, kwargs: record(seen, masked_model, mesh, kwargs), with_kwargs=True
        )
        learner.step(3, plan)
        return seen if mesh.tp_rank == 0 else {}


def record(
    seen: dict[int, dict[str, Any]], masked_model: MaskedModel, mesh: Mesh, inputs: dict[str, Any]
) -> None:
    running = masked_model.switch.running
    assert running is not None
    masks = {
        name: linear.masked_weight(torch.ones_like(linear.weight)).detach()
        for name, linear in masked_model.linears.items()
    }
    seen[running.sample.key.micro_batch] = {
        "tokens": inputs["input_ids"].clone(),
        **gather_hf(masks, masked_model, mesh),
    }


def merge(ranks: tuple[dict[int, dict[str, Any]], ...]) -> dict[int, dict[str, Any]]:
    merged: dict[int, dict[str, Any]] = {}
    for one in ranks:
        assert not merged.keys() & one.keys(), "two replicas ran the same micro-batch"
        merged.update(one)
    return merged


def test_splits_of_a_global_batch_draw_the_same_masks(tiny_run: Path) -> None:
    def job(world: int, *tps: int) -> list[dict[int, dict[str, Any]]]:
        by_rank = run_ranks(draws_of_a_step, world, [config_of(tiny_run, tp) for tp in tps])
        return [merge(layout) for layout in zip(*by_rank, strict=True)]

    (one,) = job(1, 1)  # 1 replica x 4 accumulations
    assert sorted(one) == [0, 1, 2, 3]
    assert not torch.equal(
        one[0]["model.layers.0.mlp.up_proj"], one[1]["model.layers.0.mlp.up_proj"]
    )
    for split in job(4, 1, 2):  # replicas x accumulations: 4 x 1, and 2 x 2 at TP 2
        assert sorted(split) == sorted(one)
        for number, expected in one.items():
            assert_same_bits(split[number], expected)
