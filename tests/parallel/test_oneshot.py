"""One-shot pruning of the Megatron model against plain implementations on the transformers model,
at several layouts.

Shapes: N samples, S sequence, O out_features, I in_features, T tokens.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megamask.config import Config
from megamask.config.load import build_config
from megamask.errors import ConfigError
from megamask.model.build import build_model, prunable_linears
from megamask.model.checkpoint import fill_from_hf
from megamask.model.mask_shards import linear_rules
from megamask.oneshot.criteria import find_criterion
from megamask.oneshot.gradient_sweep import sweep
from megamask.oneshot.layerwise import PrunedShard, PruningJob, passes, prune_layerwise
from megamask.parallel.mesh import start
from megamask.sparsity.margins import margins_of, to_levels
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.pattern_plan import PatternPlan
from megamask.weights.architecture import read_architecture
from megamask.weights.hf_files import open_checked
from megamask.weights.mapping import linear_shapes
from tests.parallel.plain_oneshot import DAMP, GROUP, KEEP
from tests.parallel.plain_pruning import (
    DENSE_LINEAR,
    SAMPLES,
    SCORES,
    Reference,
    Score,
    gradient_norms,
    reference,
    whole_hessian,
)
from tests.parallel.ranks import RanksError, run_ranks
from tests.parallel.tiny import gather_masks

pytestmark = pytest.mark.slow

LAYOUTS = {
    "tp1": (1, 1, False),
    "tp4": (4, 4, False),
    "tp2-sp": (2, 2, True),
    "tp2-sp-dp2": (4, 2, True),
}  # world, tp, sequence parallel
METHODS = [
    "magnitude",
    "wanda",
    "ria",
    "gblm",
    "pruner_zero",
    "sparsegpt",
    "sparsegpt_update",
    "admm_update",
]
ONE_PASS = ["wanda", "gblm", "sparsegpt", "sparsegpt_update"]  # with prune.inputs=dense
POLISHED, SWEEPS = "wanda", 2  # with prune.polish

# Scores come from fp32 activations here and there and, in the runner, from an fp32 sweep: relative
# differences of a few 1e-6, which SparseGPT's updates carry through a row. A group is a near-tie
# when its n-th and (n+1)-th score differ by less than this, relatively. With this seed no group is
# (`test_no_near_ties`), so that masks must be equal without exception.
NEAR_TIE = 1e-5
# Updated weights: fp32 sweep over at most 96 columns against fp64, relative to the layer's largest
# weight.
WEIGHT_TOLERANCE = 1e-4
# ADMM chooses 14 times by the rank of a weight in the whole linear, 300 ranks in this model, and
# some neighbours are nearer than fp32 knows them. A weight that goes a step early or late changes
# its row a little: at most 6e-4 in the layouts here, and no mask.
# A polish takes no exchange that gains less than 1e-5 of its terms, and of two that gain alike it
# takes the first: 1 weight of 1,000 was another in a linear of the layouts here.
NEAR_MASKS, ADMM_WEIGHTS = 0.005, 5e-3


# The runner, in every rank.


def prune_in_rank(
    rank: int,
    hf: str,
    tokens_NS: torch.Tensor,
    tp: int,
    sequence_parallel: bool,
    methods: list[str],
    one_pass: list[str],
) -> dict[str, Any]:
    """method -> (masks, updated weights, codes of margins), whole and in HF layout; "dense METHOD"
    for the methods that share the inputs of dense layers, "polished METHOD" for a polished mask.
    """

    def settings(**prune: Any) -> Config:
        return build_config(
            {
                "device": "cpu",
                "dtype": "fp32",
                "model": {"hf": hf, "exclude": [DENSE_LINEAR]},
                "parallel": {"tp": tp, "sequence_parallel": sequence_parallel},
                "calibration": {"micro_batch": 3},
                "prune": {"damp": DAMP, "block": 32, **prune},
            }
        )

    arch, config = read_architecture(Path(hf)), settings()
    with start(config) as mesh:
        model = build_model(config, arch, mesh).eval()
        with open_checked(Path(hf)) as reader:
            fill_from_hf(model, arch, mesh, reader)
        plan = PatternPlan.uniform([*linear_shapes(arch)], Pattern(KEEP, GROUP))
        job = PruningJob(config, mesh, arch, plan, model, prunable_linears(model, config, arch))

        def whole(pruned: dict[str, PrunedShard]) -> tuple[dict[str, torch.Tensor], ...]:
            assert all(linear.folded_weight is None for linear in job.linears.values())
            masks = gather_masks({name: one.mask_OI for name, one in pruned.items()}, arch, mesh)
            weights: dict[str, torch.Tensor] = {}
            codes: dict[str, torch.Tensor] = {}
            for name, one in pruned.items():
                rule = linear_rules(arch)[name]
                codes |= rule.to_hf(rule.join(mesh.gather_over_tp(one.margin_codes_OI)))
                if one.weight_OI is not None:
                    weights |= rule.to_hf(rule.join(mesh.gather_over_tp(one.weight_OI)))
            return masks, *(
                {name.removesuffix(".weight"): one for name, one in found.items()}
                for found in (weights, codes)
            )

        results, gradients = {}, sweep(job, tokens_NS) if len(methods) > 1 else None

        def run(before: str, methods: list[str], **prune: Any) -> None:
            here = replace(job, config=settings(**prune))
            found = {one: find_criterion(one, here.config.prune) for one in methods}
            for criteria in passes(here.config, found):
                assert len(criteria) == (len(methods) if before == "dense " else 1)
                pruned = prune_layerwise(here, criteria, tokens_NS, gradients)
                for method, shards in pruned.items():
                    results[before + method] = whole(shards)

        run("", methods)
        run("dense ", one_pass, inputs="dense")
        if one_pass:
            run("polished ", [POLISHED], polish=SWEEPS)
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
        num_attention_heads=8,
        num_key_value_heads=4,
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
        99, (SAMPLES, 24), generator=torch.Generator().manual_seed(6)
    )  # 6 micro-batches of 3, the last one short


@pytest.fixture(scope="module")
def gradients(tiny: Path, tokens_NS: torch.Tensor) -> dict[str, torch.Tensor]:
    return gradient_norms(tiny, tokens_NS)


@pytest.fixture(scope="module")
def references(
    tiny: Path, tokens_NS: torch.Tensor, gradients: dict[str, torch.Tensor]
) -> dict[str, Reference]:
    def of(method: str, **how: Any) -> Reference:
        return reference(tiny, tokens_NS, method, gradients=gradients, **how)

    own = {method: of(method) for method in METHODS}
    shared = {f"dense {method}": of(method, pruned_prefix=False) for method in ONE_PASS}
    return own | shared | {f"polished {POLISHED}": of(POLISHED, sweeps=SWEEPS)}


def test_no_near_ties(references: dict[str, Reference]) -> None:
    gaps = {name: one.gap for name, one in references.items() if "admm" not in name}
    assert all(gap > NEAR_TIE for gap in gaps.values()), gaps


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_plain_implementation(
    layout: str, tiny: Path, tokens_NS: torch.Tensor, references: dict[str, Reference]
) -> None:
    world, tp, sequence_parallel = LAYOUTS[layout]
    ranks = run_ranks(
        prune_in_rank, world, str(tiny), tokens_NS, tp, sequence_parallel, METHODS, ONE_PASS
    )
    for method, expected in references.items():
        is_admm = "admm" in method
        is_near = is_admm or "polished" in method
        for rank in ranks:
            masks, weights, codes = rank[method]
            assert set(codes) == set(masks)
            for name, codes_OI in codes.items():
                found_OI = margins_of(to_levels(codes_OI))
                # An exchange that only one of the two made is bounded below, by NEAR_MASKS; its
                # weights have a margin in one and the least margin in the other, and those of a
                # polish change the scores of the whole row.
                same_OI = masks[name] == expected.masks[name]
                if "polished" in method:
                    same_OI = same_OI.all(1, keepdim=True).expand_as(same_OI)
                wanted_OI = expected.margins[name]
                assert margins_agree(found_OI, wanted_OI, same_OI), f"{method} {name}"
                assert not margins_agree(found_OI.roll(1, 0), wanted_OI, same_OI)
            assert set(masks) == set(expected.masks) and DENSE_LINEAR not in masks
            for name, mask_OI in masks.items():
                share = float((mask_OI != expected.masks[name]).float().mean())
                assert share <= (NEAR_MASKS if is_near else 0), f"{method} {name}: {share}"
            for name, weight_OI in weights.items():
                difference = (weight_OI - expected.weights[name]).abs().max() / expected.weights[
                    name
                ].abs().max()
                limit = ADMM_WEIGHTS if is_admm else WEIGHT_TOLERANCE
                assert difference < limit, f"{method} {name}: {difference}"
            assert bool(weights) == method.endswith("_update")


def margins_agree(found_OI: torch.Tensor, expected_OI: torch.Tensor, same_OI: torch.Tensor) -> bool:
    """Whether margins in medians are those of scores in any unit, where the masks are the same. A
    code is half an octave wide and its median another, so levels lie within half an octave; fp32
    scores may fall to the next code.
    """
    expected_OI = expected_OI / expected_OI.median()
    octaves = (found_OI / expected_OI.clamp(found_OI.min(), found_OI.max())).log2().abs()[same_OI]
    return float(octaves.max()) < 1.01 and float((octaves <= 0.5).float().mean()) > 0.99


def test_wrong_answers_differ(
    tiny: Path,
    tokens_NS: torch.Tensor,
    references: dict[str, Reference],
    gradients: dict[str, torch.Tensor],
) -> None:
    """What the comparison above would catch: a dense prefix, a Hessian of one rank's features, a
    forgotten activation norm, sums and extremes over the rows of one rank, gradients
    of one replica, a mask without its polish.
    """

    def local_hessian(x_TI: torch.Tensor) -> torch.Tensor:
        halves = [whole_hessian(half) for half in x_TI.chunk(2, dim=1)]
        return torch.block_diag(*halves)

    def of_row_shards(score: Score) -> Score:
        return lambda weight_OI, x_TI, g_OI: torch.cat(
            [
                score(half_OI, x_TI, gradient_OI)
                for half_OI, gradient_OI in zip(weight_OI.chunk(2), g_OI.chunk(2), strict=True)
            ]
        )

    def of(method: str, score: Score | None = None, per: float = 1.0) -> Reference:
        scaled = {name: one_OI * per for name, one_OI in gradients.items()}
        return reference(tiny, tokens_NS, method, score=score, gradients=scaled)

    wrong = {
        "ria": of("ria", of_row_shards(SCORES["ria"])),
        "pruner_zero": of("pruner_zero", of_row_shards(SCORES["pruner_zero"])),
        "gblm": of("gblm", per=0.5),  # the gradients of one replica of four
        "polished wanda": references["wanda"],
        "wanda": references["dense wanda"],
        "sparsegpt": reference(tiny, tokens_NS, "sparsegpt", hessian=local_hessian),
        "admm_update": reference(tiny, tokens_NS, "admm_update", hessian=local_hessian),
    }
    for method, one in wrong.items():
        share = [
            float((one.masks[name] != mask_OI).float().mean())
            for name, mask_OI in references[method].masks.items()
        ]
        # Masks are equal without exception, but for ADMM's and polished masks.
        near = "admm" in method or "polished" in method
        assert max(share) > (10 * NEAR_MASKS if near else 0.002), method
    assert any(
        not torch.equal(references["wanda"].masks[name], mask_OI)
        for name, mask_OI in references["magnitude"].masks.items()
    )
    plain = {
        name: (w - references["sparsegpt"].weights[name]).abs().max()
        for name, w in references["sparsegpt_update"].weights.items()
    }
    # Weights without the update are far off.
    assert max(plain.values()) > 100 * WEIGHT_TOLERANCE > ADMM_WEIGHTS


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
        run_ranks(prune_in_rank, 2, str(tmp_path), tokens_NS, 2, False, ["wanda"], [])
