"""One-shot pruning of the Megatron model against plain implementations on the transformers model,
at several layouts.

The reference knows nothing of Megatron, fused linears or shards: it runs the whole transformers
model with hooks on one decoder layer at a time, prunes that layer's linears in place, and goes on.
Criteria are the papers', in fp64.

Shapes: N samples, S sequence, O out_features, I in_features, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megamask.config.load import build_config
from megamask.errors import ConfigError
from megamask.model.build import build_model, prunable_linears
from megamask.model.checkpoint import fill_from_hf
from megamask.model.mask_shards import linear_rules
from megamask.oneshot.criteria import CRITERIA
from megamask.oneshot.layerwise import PruningJob, prune_layerwise
from megamask.parallel.mesh import start
from megamask.sparsity.margins import margins_of, to_levels
from megamask.sparsity.pattern import Pattern
from megamask.weights.architecture import read_architecture
from megamask.weights.hf_files import open_checked
from tests.parallel.plain_oneshot import (
    DAMP,
    GROUP,
    KEEP,
    keep_largest,
    ria_score,
    sparsegpt_textbook,
    wanda_score,
)
from tests.parallel.ranks import RanksError, run_ranks
from tests.parallel.tiny import gather_masks

pytestmark = pytest.mark.slow

DENSE_LINEAR = "model.layers.1.self_attn.o_proj"  # kept out with model.exclude
LAYOUTS = {
    "tp1": (1, 1, False),
    "tp2": (2, 2, False),
    "tp2-sp": (2, 2, True),
    "tp2-sp-dp2": (4, 2, True),
}  # world, tp, sequence parallel
METHODS = ["magnitude", "wanda", "ria", "sparsegpt", "sparsegpt_update"]

# Scores come from fp32 activations here and there and, in the runner, from an fp32 sweep: relative
# differences of a few 1e-6, which SparseGPT's updates carry through a row. A group is a near-tie
# when its n-th and (n+1)-th score differ by less than this, relatively. With this seed no group is
# (`test_no_near_ties`), so that masks must be equal without exception.
NEAR_TIE = 1e-5
# Updated weights: fp32 sweep over at most 96 columns against fp64, relative to the layer's largest
# weight.
WEIGHT_TOLERANCE = 1e-4


# The plain reference.


@dataclass
class Reference:
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    margins: dict[str, torch.Tensor] = field(default_factory=dict)
    gap: float = 1.0


Hessian = Callable[[torch.Tensor], torch.Tensor]
Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
SCORES: dict[str, Score] = {
    "magnitude": lambda weight_OI, _: weight_OI.abs(),
    "wanda": wanda_score,
    "ria": ria_score,
}


def whole_hessian(x_TI: torch.Tensor) -> torch.Tensor:
    return x_TI.double().T @ x_TI.double()


def inputs_of(
    linears: dict[str, torch.nn.Linear], model: torch.nn.Module, tokens_NS: torch.Tensor
) -> dict[str, torch.Tensor]:
    inputs: dict[str, torch.Tensor] = {}
    hooks = [
        linear.register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0].flatten(0, 1)})
        )
        for name, linear in linears.items()
    ]
    model(tokens_NS)
    for hook in hooks:
        hook.remove()
    return inputs


@torch.no_grad()
def reference(
    hf: Path,
    tokens_NS: torch.Tensor,
    method: str,
    hessian: Hessian = whole_hessian,
    pruned_prefix: bool = True,
    score: Score | None = None,
) -> Reference:
    model = LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    result, dense = Reference(), {name: one.clone() for name, one in model.state_dict().items()}
    for index, layer in enumerate(model.model.layers):
        linears = {
            f"model.layers.{index}.{name}": one
            for name, one in layer.named_modules()
            if isinstance(one, torch.nn.Linear)
        }
        linears.pop(DENSE_LINEAR, None)
        inputs = inputs_of(linears, model, tokens_NS)
        for name, linear in linears.items():
            x_TI, weight_OI = inputs[name], dense[f"{name}.weight"]
            if method in SCORES:
                mask_OI, margin_OI, gap = keep_largest((score or SCORES[method])(weight_OI, x_TI))
                new_OI = weight_OI * mask_OI
            else:
                mask_OI, updated_OI, margin_OI, gap = sparsegpt_textbook(weight_OI, hessian(x_TI))
                new_OI = updated_OI if method == "sparsegpt_update" else weight_OI * mask_OI
            result.masks[name], result.weights[name] = mask_OI, new_OI
            result.margins[name], result.gap = margin_OI, min(result.gap, gap)
            if pruned_prefix:
                linear.weight.copy_(new_OI)
    return result


# The runner, in every rank.


def prune_in_rank(
    rank: int,
    hf: str,
    tokens_NS: torch.Tensor,
    tp: int,
    sequence_parallel: bool,
    methods: list[str],
) -> dict[str, Any]:
    """method -> (masks, updated weights, codes of margins), whole and in HF layout."""
    config = build_config(
        {
            "device": "cpu",
            "dtype": "fp32",
            "model": {"hf": hf, "exclude": [DENSE_LINEAR]},
            "parallel": {"tp": tp, "sequence_parallel": sequence_parallel},
            "calibration": {"micro_batch": 3},
            "prune": {"damp": DAMP, "block": 32},
        }
    )
    arch = read_architecture(Path(hf))
    with start(config) as mesh:
        model = build_model(config, arch, mesh).eval()
        with open_checked(Path(hf)) as reader:
            fill_from_hf(model, arch, mesh, reader)
        job = PruningJob(
            config, mesh, arch, Pattern(KEEP, GROUP), model, prunable_linears(model, config, arch)
        )
        results = {}
        for method in methods:
            pruned = prune_layerwise(job, CRITERIA[method], tokens_NS)
            assert all(linear.folded_weight is None for linear in job.linears.values())
            masks = gather_masks({name: one.mask_OI for name, one in pruned.items()}, arch, mesh)
            weights: dict[str, torch.Tensor] = {}
            codes: dict[str, torch.Tensor] = {}
            for name, one in pruned.items():
                rule = linear_rules(arch)[name]
                codes |= rule.to_hf(rule.join(mesh.gather_over_tp(one.margin_codes_OI)))
                if one.weight_OI is not None:
                    weights |= rule.to_hf(rule.join(mesh.gather_over_tp(one.weight_OI)))
            results[method] = (
                masks,
                *(
                    {name.removesuffix(".weight"): one for name, one in found.items()}
                    for found in (weights, codes)
                ),
            )
        return results


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with grouped queries and an odd vocabulary, whose features differ in size."""
    torch.manual_seed(8)
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "norm" in name:
                one.copy_(
                    torch.randn_like(one).exp()
                )  # else all features are alike, and Wanda is magnitude
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokens_NS() -> torch.Tensor:
    return torch.randint(
        99, (16, 24), generator=torch.Generator().manual_seed(1)
    )  # 6 micro-batches of 3, the last one short


@pytest.fixture(scope="module")
def references(tiny: Path, tokens_NS: torch.Tensor) -> dict[str, Reference]:
    return {method: reference(tiny, tokens_NS, method) for method in METHODS}


def test_no_near_ties(references: dict[str, Reference]) -> None:
    assert all(one.gap > NEAR_TIE for one in references.values()), {
        name: one.gap for name, one in references.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_plain_implementation(
    layout: str, tiny: Path, tokens_NS: torch.Tensor, references: dict[str, Reference]
) -> None:
    world, tp, sequence_parallel = LAYOUTS[layout]
    ranks = run_ranks(prune_in_rank, world, str(tiny), tokens_NS, tp, sequence_parallel, METHODS)
    for method, expected in references.items():
        for rank in ranks:
            masks, weights, codes = rank[method]
            assert set(codes) == set(masks)
            for name, codes_OI in codes.items():
                found_OI = margins_of(to_levels(codes_OI))
                assert margins_agree(found_OI, expected.margins[name]), f"{method} {name}"
                assert not margins_agree(found_OI.roll(1, 0), expected.margins[name])
            assert set(masks) == set(expected.masks) and DENSE_LINEAR not in masks
            for name, mask_OI in masks.items():
                assert torch.equal(mask_OI, expected.masks[name]), f"{method} {name}"
            for name, weight_OI in weights.items():
                difference = (weight_OI - expected.weights[name]).abs().max() / expected.weights[
                    name
                ].abs().max()
                assert difference < WEIGHT_TOLERANCE, f"{name}: {difference}"
            assert bool(weights) == (method == "sparsegpt_update")


def margins_agree(found_OI: torch.Tensor, expected_OI: torch.Tensor) -> bool:
    """Whether margins in medians are those of scores in any unit. A code is half an octave wide and
    its median another, so levels lie within half an octave; fp32 scores may fall to the next code.
    """
    expected_OI = expected_OI / expected_OI.median()
    octaves = (found_OI / expected_OI.clamp(found_OI.min(), found_OI.max())).log2().abs()
    return float(octaves.max()) < 1.01 and float((octaves <= 0.5).float().mean()) > 0.99


def test_wrong_answers_differ(
    tiny: Path, tokens_NS: torch.Tensor, references: dict[str, Reference]
) -> None:
    """What the comparison above would catch: a dense prefix, a Hessian of one rank's features, a
    forgotten activation norm, column sums over the rows of one rank.
    """

    def local_hessian(x_TI: torch.Tensor) -> torch.Tensor:
        halves = [whole_hessian(half) for half in x_TI.chunk(2, dim=1)]
        return torch.block_diag(*halves)

    def score_of_row_shards(weight_OI: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
        return torch.cat([ria_score(half_OI, x_TI) for half_OI in weight_OI.chunk(2)])

    wrong = {
        "ria": reference(tiny, tokens_NS, "ria", score=score_of_row_shards),
        "wanda": reference(tiny, tokens_NS, "wanda", pruned_prefix=False),
        "sparsegpt": reference(tiny, tokens_NS, "sparsegpt", hessian=local_hessian),
    }
    for method, one in wrong.items():
        share = [
            float((one.masks[name] != mask_OI).float().mean())
            for name, mask_OI in references[method].masks.items()
        ]
        assert max(share) > 0.01
    assert any(
        not torch.equal(references["wanda"].masks[name], mask_OI)
        for name, mask_OI in references["magnitude"].masks.items()
    )
    plain = {
        name: (w - references["sparsegpt"].weights[name]).abs().max()
        for name, w in references["sparsegpt_update"].weights.items()
    }
    assert max(plain.values()) > 100 * WEIGHT_TOLERANCE  # weights without the update are far off


def test_names_the_linear_whose_inputs_are_not_finite(
    tiny: Path, tokens_NS: torch.Tensor, tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        # finite, so that convert takes it, and too large for the sum over inputs
        model.model.layers[1].mlp.up_proj.weight[5] = 3e38
    model.save_pretrained(tmp_path)
    with pytest.raises(
        RanksError,
        match=rf"{ConfigError.__name__}.*"
        r"model\.layers\.1\.mlp\.down_proj: activations must be finite",
    ):
        run_ranks(prune_in_rank, 2, str(tmp_path), tokens_NS, 2, False, ["wanda"])
