"""Named defaults. A preset sits below the recipe and the overrides: whatever they set wins."""

from __future__ import annotations

from typing import Any

# MaskLLM, Table 7 (LLaMA-2 7B) and Appendix A: 2,000 steps, global batch 256, AdamW(5e-4, wd 0.1),
# kappa 1e2 -> 5e2, tau 4 -> 0.05, SparseGPT prior with alpha 3, logits N(0, 0.01), weight-norm term
# 1e-5.
MASKLLM: dict[str, Any] = {
    "learn": {
        "steps": 2000,
        "global_batch": 256,
        "distribution": "categorical",
        "sampling": {
            "mode": "soft",
            "kappa": [100.0, 500.0],
            "tau": [4.0, 0.05],
            "logit_std": 0.01,
            "initial_noise": True,
        },
        "prior": {"mask": "sparsegpt", "strength": 3.0},
        "optimizer": {
            "lr": 5e-4,
            "min_lr": 1e-4,
            "weight_decay": 0.1,
            "schedule": "cosine",
            "warmup_steps": 0,
            "eps_rms": 0.0,
        },
        "weight_norm": {"coef": 1e-5, "decay": "none"},
    }
}

# The defaults of megamask/config/tree.py: what did best on SmolLM2-135M in short runs
# (docs/results/learners.md). One logit a weight; the prior itself as the start, as there is no time
# to undo random flips, and nearly hard masks soon, for the same reason; a weight-norm term that
# leaves the last word to the loss; a rate that fits the number of steps, a warm-up, and an epsilon
# that spares small gradients.
BEST: dict[str, Any] = {}

# MaskPro needs one logit a weight, and starts from the prior alone.
_POLICY: dict[str, Any] = {
    "distribution": "linear",
    "sampling": {"mode": "hard", "initial_noise": False},
}
LEARNERS: dict[str, dict[str, Any]] = {"gumbel": {}, "maskpro": {"learn": _POLICY}}

# MaskPro's reference settings: 10,000 steps of one mask on 32 sequences of 128 tokens out of 512,
# logits 10 m_0, rate 50, tracker 0.99.
MASKPRO: dict[str, Any] = {
    "data": {"seq_length": 128},
    "learn": {
        **_POLICY,
        "learner": "maskpro",
        "steps": 10_000,
        "global_batch": 32,
        "micro_batch": 32,
        "prior": {"mask": "sparsegpt"},
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

# Bytes a weight at 2:4, the frozen weight included: default 26, lean 14, leanest 9.5 (megamask plan
# counts every part). Lean keeps AdamW, and with it the recipe's learning rate. Lion moves every
# logit by the full rate whatever its gradient, so it needs about a third of AdamW's rate, and so
# more steps for a group to overtake the prior's gap. It does not take over a preset's rate, but a
# recipe's.
_BF16 = {"logits": "bf16", "grads": "bf16", "masked_weight": "regenerate"}
LEAN: dict[str, Any] = {"learn": {"state": _BF16}}
LEANEST: dict[str, Any] = {
    "learn": {
        "state": {**_BF16, "movement": False},
        "optimizer": {"kind": "lion8bit", "betas": [0.9, 0.99], "lr": None, "min_lr": None},
    }
}

FOOTPRINTS: dict[str, dict[str, Any]] = {"default": {}, "lean": LEAN, "leanest": LEANEST}
PRESETS: dict[str, dict[str, Any]] = {"best": BEST, "maskllm": MASKLLM, "maskpro": MASKPRO}
