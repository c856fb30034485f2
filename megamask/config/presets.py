"""Named settings. They lie below the recipe and the overrides: a given value wins over them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from megamask.config.nested import merge

# MaskLLM, Table 7 (LLaMA-2 7B) and Appendix A: 2,000 steps, global batch 256, AdamW(5e-4, weight
# decay 0.1), kappa 1e2 -> 5e2, tau 4 -> 0.05, SparseGPT prior with alpha 3, logits N(0, 0.01),
# weight-norm term 1e-5.
MASKLLM: dict[str, Any] = {
    "learn": {
        "method": "categorical",
        "steps": 2000,
        "global_batch": 256,
        "sampling": {
            "mode": "soft",
            "kappa": [100.0, 500.0],
            "tau": [4.0, 0.05],
            "logit_std": 0.01,
            "noise": 1.0,
            "initial_noise": True,
        },
        "prior": {"mask": "sparsegpt", "strength": 3.0, "margins": False},
        "optimizer": {
            "lr": 5e-4,
            "min_lr": 1e-4,
            "weight_decay": 0.1,
            "betas": [0.9, 0.95],
            "schedule": "cosine",
            "warmup_steps": 0,
            "epsilon": [1e-8, 0.0],
        },
        "weight_norm": [1e-5, 1e-5],
    }
}

# The defaults of the tree are the settings that did best on SmolLM2-135M in short runs
# (docs/results/learners.md): one logit per weight; a start from the prior alone, masks without
# noise and nearly hard masks soon, because a short run has no time to undo random flips; a
# weight-norm term that fades, so that the language-model loss decides at the end; a rate that fits
# the number of steps; a warm-up; and an epsilon with which small gradients move logits less.
BEST: dict[str, Any] = {}

# MaskPro draws hard masks and starts from the prior alone.
_MASKPRO_SAMPLING: dict[str, Any] = {
    "sampling": {"mode": "hard", "noise": 1.0, "initial_noise": False},
    "prior": {"margins": False},
}

# MaskPro's reference settings: 10,000 steps of one mask on 32 sequences of 128 tokens out of 512
# sequences, logits 10 m_0, rate 50, tracker 0.99.
MASKPRO: dict[str, Any] = {
    "data": {"seq_length": 128},
    "learn": {
        **_MASKPRO_SAMPLING,
        "method": "maskpro",
        "steps": 10_000,
        "global_batch": 32,
        "micro_batch": 32,
        "prior": {"mask": "sparsegpt", "margins": False},
        "maskpro": {
            "lr": 50.0,
            "initial_logit": 10.0,
            "masks": 1,
            "baseline": "tracker",
            "tracker_decay": 0.99,
            "samples": 512,
        },
    },
}

# RoI (arXiv 2608.23048): a logit a weight without a prior, kappa and tau annealed by equal factors
# in the first three quarters of 2,000 steps, 2 billion tokens in all. The global batch makes a
# million tokens a step of sequences of 4,096. Warm-up and epsilon are AdamW's usual none and 1e-8.
ROI: dict[str, Any] = {
    "learn": {
        "method": "subset",
        "steps": 2000,
        "global_batch": 256,
        "sampling": {
            "kappa": [1.0, 500.0],
            "tau": [1.0, 0.05],
            "schedule": "exponential",
            "annealed_by": 0.75,
            "noise": 1.0,
            "initial_noise": True,
        },
        "prior": {"mask": None},
        "optimizer": {
            "lr": 1e-3,
            "min_lr": 1e-4,
            "weight_decay": 0.05,
            "betas": [0.9, 0.95],
            "warmup_steps": 0,
            "epsilon": [1e-8, 0.0],
        },
        "weight_norm": [0.0, 0.0],
    }
}

# Few samples: public cards of masks that were learned from a strong prior say that the divergence
# from the dense model hardly falls beyond 2,048 sequences. 128 steps of 16 are so many; the layers
# of the dense model say more about each of them.
MINUTES: dict[str, Any] = {
    "learn": {"steps": 128, "global_batch": 16, "distillation": {"hidden": 1.0}}
}

# Bytes per weight at 2:4 with learn.method=categorical, the frozen weight included: default 26,
# lean 14, leanest 9.5 (megamask plan counts every part). Lean keeps AdamW, and with it the recipe's
# learning rate. Lion moves every logit by the full rate whatever its gradient is, so it needs about
# a third of AdamW's rate. Leanest therefore drops the rate and the decays of a preset; those that
# the recipe or the command line gives are kept.
_BF16 = {"logits": "bf16", "grads": "bf16", "masked_weight": "regenerate"}
LEAN: dict[str, Any] = {"learn": {"state": _BF16}}
LEANEST: dict[str, Any] = {
    "learn": {
        "state": {**_BF16, "track_flips": False},
        "optimizer": {"kind": "lion8bit", "betas": None, "lr": None, "min_lr": None},
    }
}

METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "categorical": {"learn": {"sampling": {"noise": 1.0}}},  # MaskLLM's; 0 was tried with subset
    "maskpro": {"learn": _MASKPRO_SAMPLING},
}
PRESETS: dict[str, dict[str, Any]] = {
    "best": BEST,
    "minutes": MINUTES,
    "maskllm": MASKLLM,
    "maskpro": MASKPRO,
    "roi": ROI,
}
MEMORIES: dict[str, dict[str, Any]] = {"default": {}, "lean": LEAN, "leanest": LEANEST}
# setting of learn -> its names -> what a name stands for; a later setting lies above an earlier
NAMED = {"method": METHOD_SETTINGS, "preset": PRESETS, "memory": MEMORIES}


def layered(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` over the named settings that they ask for: method < preset < memory < values.

    Args:
        values: sections by name, as mappings or as sections of the tree; of a section of the tree,
            the settings that were given when it was made.
    """
    given = plain(values)
    whole = named_settings(given)
    merge(whole, given)
    return whole


def named_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The named settings that ``learn.method``, ``learn.preset`` and ``learn.memory`` of ``given``
    ask for. A name that does not exist is left to the checks of the tree.
    """
    whole: dict[str, Any] = {}
    learn = given.get("learn")
    for key, known in NAMED.items():
        name = learn.get(key) if isinstance(learn, dict) else None
        merge(whole, known.get(name, {}) if isinstance(name, str) else {})
    return whole


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, with the sections of the tree replaced by what was given to them."""
    return {
        key: plain(value.model_dump(exclude_unset=True))
        if isinstance(value, BaseModel)
        else plain(value)
        if isinstance(value, Mapping)
        else value
        for key, value in values.items()
    }
