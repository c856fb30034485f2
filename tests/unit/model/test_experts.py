"""Mixtures of experts in one process: experts without tokens, statistics of routed tokens, and
gradients under every ``parallel.recompute``.

Shapes: T tokens, K experts of a token, I in_features.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from megamask.config.load import build_config
from megamask.model.build import attach_logits, build_model, masked_linears
from megamask.model.experts import MixtureOfExperts
from megamask.model.language_model import LanguageModel
from megamask.oneshot.calibrate import HiddenStates, input_stats
from megamask.oneshot.gblm import GBLM
from megamask.oneshot.layerwise import PruningJob, warn_of_unseen
from megamask.oneshot.magnitude import Magnitude
from megamask.oneshot.sparsegpt import SparseGPT
from megamask.oneshot.stats import GradientStats, InputStats, Statistics
from megamask.oneshot.wanda import Wanda
from megamask.parallel.mask_context import RunningSample
from megamask.parallel.masked_linear import MaskedLinear
from megamask.parallel.mesh import Mesh, start
from megamask.plan.workload import Workload
from megamask.sparsity.draw import Sample
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.pattern_plan import PatternPlan
from megamask.sparsity.subset.subset import SUBSET
from megamask.weights.family import Architecture, Experts, Layer
from megamask.weights.mapping import prunable

P24 = Pattern(2, 4)
ARCH = Architecture(
    "qwen2_moe",
    num_layers=2,
    hidden=32,
    ffn=48,
    heads=4,
    kv_heads=2,
    head_dim=8,
    vocab=64,
    max_positions=32,
    tied=False,
    layers=(Layer(experts=True), Layer()),
    experts=Experts(6, 2, 16, renormalise=True, shared_ffn=24),
)


def config(recompute: bool | str = False) -> Any:
    parallel = {"threads": 1, "recompute": recompute}
    return build_config({"device": "cpu", "dtype": "fp32", "parallel": parallel})


def random_model(
    mesh: Mesh, recompute: bool | str = False, arch: Architecture = ARCH
) -> LanguageModel:
    model = build_model(config(recompute), arch, mesh)
    noise = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3, generator=noise)
    return model


def experts_of(model: LanguageModel) -> MixtureOfExperts:
    return cast(MixtureOfExperts, model.decoder.layers[0].mlp)


def varied() -> torch.Tensor:
    return torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))


def alike() -> torch.Tensor:
    """One token everywhere: all hidden states are the same, so most experts get none."""
    return torch.full((2, 16), 5)


def gradients(recompute: bool | str, tokens_BS: torch.Tensor) -> dict[str, torch.Tensor]:
    with start(config(recompute)) as mesh:
        model = random_model(mesh, recompute)
        linears = masked_linears(model)
        for linear in linears.values():
            linear.weight.requires_grad_(True)
        model.token_losses(tokens_BS, tokens_BS.roll(-1, 1)).mean().backward()
        found = {name: linear.weight.grad for name, linear in linears.items()}
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


def test_every_expert_has_a_gradient_in_every_mode_of_recomputation() -> None:
    plain = gradients(False, alike())
    assert len(plain) == 2 * 2 + 2 * 6 + 2 + 2  # attention, experts, the shared expert, dense
    zeros = [name for name, one in plain.items() if not one.any()]
    assert len(zeros) == 2 * 4 and all(".experts." in name for name in zeros)
    for recompute in ("mlp", True):
        again = gradients(recompute, alike())
        assert all(torch.equal(again[name], plain[name]) for name in plain)
    assert all(one.any() for one in gradients(False, varied()).values())


def test_the_gradient_of_a_sample_replaces_the_buffer_of_an_expert_without_tokens() -> None:
    """The buffer holds the gradient of the step before, which must not stay."""
    with start(config()) as mesh:
        model = random_model(mesh)
        linears = masked_linears(model)
        switch = attach_logits(linears, dict.fromkeys(linears, P24), "torch", mesh.device, SUBSET)
        for linear in linears.values():
            logits: Any = linear.mask_logits
            logits.main_grad = torch.full_like(logits, 7.0)
        sample = Sample(NoiseKey(1, 2, 3), 100.0, 1.0)
        switch.running = RunningSample(sample, is_first=True)
        tokens_BS = alike()
        model.token_losses(tokens_BS, tokens_BS.roll(-1, 1)).mean().backward()
        assert len(switch.running.measured) == len(linears)
        left = [
            name
            for name, linear in linears.items()
            if bool((cast(Any, linear.mask_logits).main_grad == 7.0).all())
        ]
        assert not left


def statistics(tokens_BS: torch.Tensor) -> tuple[dict[str, InputStats], torch.Tensor, torch.Tensor]:
    """Of the linears of the first layer, with the experts' inputs (T, H) and choices (T, K)."""
    with start(config()) as mesh, torch.no_grad():
        model = random_model(mesh).eval()
        mixture, seen = experts_of(model), []
        mixture.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
        states = HiddenStates(model, tokens_BS, 2, mesh)
        own = {
            name: linear
            for name, linear in masked_linears(model).items()
            if name.startswith("decoder.layers.0.mlp.")
        }
        with input_stats(own, True, mesh, False) as stats:
            states.feed(model.decoder.layers[0], own.values())
        warn_of_unseen(PruningJob(config(), mesh, ARCH, PatternPlan({}), model, own), stats)
        return stats, seen[0], mixture.choose(seen[0])[1]


def test_statistics_are_those_of_the_routed_tokens() -> None:
    stats, inputs_TI, chosen_TK = statistics(varied())
    for expert in range(6):
        own_TI = inputs_TI[(chosen_TK == expert).any(1)]
        found = stats[f"decoder.layers.0.mlp.experts.{expert}.linear_fc1"]
        assert found.tokens == len(own_TI) > 0
        assert torch.allclose(found.sum_square_I, own_TI.square().sum(0), rtol=1e-5)
        assert not torch.allclose(found.sum_square_I, inputs_TI.square().sum(0), rtol=1e-2)
    shared = stats["decoder.layers.0.mlp.shared_expert.linear_fc1"]
    assert torch.allclose(shared.sum_square_I, inputs_TI.square().sum(0), rtol=1e-5)


def test_an_expert_without_tokens_is_named_and_goes_by_its_weights(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        stats, _, chosen_TK = statistics(alike())
    unseen = sorted(set(range(6)) - set(chosen_TK.flatten().tolist()))
    assert len(unseen) == 4
    (warning,) = [one for one in caplog.messages if "no calibration token" in one]
    for expert in range(6):
        pattern = f"model.layers.0.mlp.experts.{expert}.*"
        assert (pattern in warning.split(":")[0].split(", ")) is (expert in unseen)
        left = prunable(ARCH, ["*"], [pattern])  # a pattern that fits no linear is refused
        assert not any(f".experts.{expert}." in name for name in left)
    settings = config().prune
    weight_OI = torch.randn(8, 32, generator=torch.Generator().manual_seed(2))
    plain = Magnitude().prune(weight_OI, Statistics(), P24, settings).mask_OI
    of_unseen = Statistics(stats[f"decoder.layers.0.mlp.experts.{unseen[0]}.linear_fc1"])
    of_seen = Statistics(stats[f"decoder.layers.0.mlp.experts.{int(chosen_TK[0, 0])}.linear_fc1"])
    for criterion in (Wanda(), SparseGPT(update=False)):
        assert torch.equal(criterion.prune(weight_OI, of_unseen, P24, settings).mask_OI, plain)
    assert not torch.equal(Wanda().prune(weight_OI, of_seen, P24, settings).mask_OI, plain)
    # The dense model may send tokens, and so gradients, where the pruned model sends none.
    squares_OI = 1e6 * torch.rand(8, 32, generator=torch.Generator().manual_seed(3))
    of_unseen, of_seen = (
        replace(one, gradients=GradientStats(squares_OI, 4)) for one in (of_unseen, of_seen)
    )
    assert torch.equal(GBLM().prune(weight_OI, of_unseen, P24, settings).mask_OI, plain)
    assert not torch.equal(GBLM().prune(weight_OI, of_seen, P24, settings).mask_OI, plain)


@pytest.mark.parametrize("shared_ffn", [None, 24])
def test_the_plan_counts_what_experts_save(shared_ffn: int | None) -> None:
    """Beside its count are the masked weights, and fewer than 32 numbers a token for the router's
    choice (E probabilities, K numbers in int64, factors); H is 128, so one H more or less shows.
    """
    arch = replace(ARCH, hidden=128, experts=Experts(6, 2, 16, True, shared_ffn=shared_ffn))
    tokens, saved = 256, dict[int, torch.UntypedStorage]()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with start(config()) as mesh:
        model = random_model(mesh, arch=arch)
        linears = masked_linears(model)
        switch = attach_logits(linears, dict.fromkeys(linears, P24), "torch", mesh.device, SUBSET)
        sample = Sample(NoiseKey(1, 2, 3), 100.0, 1.0)
        switch.running = RunningSample(sample, is_first=True)
        hidden_SBH = torch.randn(tokens, 1, 128, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            experts_of(model)(hidden_SBH)
        for parameter in model.parameters():
            saved.pop(parameter.untyped_storage().data_ptr(), None)
        weights = sum(
            linear.weight.numel() for name, linear in linears.items() if ".layers.0.mlp." in name
        )
    measured = sum(storage.nbytes() for storage in saved.values()) / 4 - weights
    work = Workload(config(), arch)
    planned = tokens * (work.mlp_inputs(0) * 128 + 5 * work.ffn_of(0))
    assert planned <= measured < planned + 32 * tokens


def test_a_linear_exchanges_nothing_only_without_a_bias() -> None:
    with start(config()) as mesh:
        model = random_model(mesh)
        linears: dict[str, MaskedLinear] = masked_linears(model)
        outside = {name for name, linear in linears.items() if not linear.is_expert}
        assert outside == {
            "decoder.layers.0.self_attention.linear_qkv",
            "decoder.layers.0.self_attention.linear_proj",
            *(
                f"decoder.layers.1.{name}"
                for name in (
                    "self_attention.linear_qkv",
                    "self_attention.linear_proj",
                    "mlp.linear_fc1",
                    "mlp.linear_fc2",
                )
            ),
        }


def test_gradients_that_are_all_zero_leave_the_weights_to_decide() -> None:
    from megamask.oneshot.pruner_zero import PrunerZero

    weight_OI = torch.randn(8, 32, generator=torch.Generator().manual_seed(2))
    none = Statistics(gradients=GradientStats(torch.zeros(8, 32), 4))
    found = PrunerZero().prune(weight_OI, none, P24, config().prune)
    assert torch.equal(found.mask_OI, P24.best(weight_OI.abs()))
