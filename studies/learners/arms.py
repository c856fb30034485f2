"""The arms of the study: every run of the comparison and of the ablations.

Settings are dotted, and belong to ``learn`` unless they begin with another section. Two arms with
equal settings are the same run. So an ablation can list all values of a setting, including the
value of the comparison.
"""

from __future__ import annotations

from megamask.sparsity.pattern import Pattern
from studies.learners.arm import GRADIENT, Arm, Group, Settings

CATEGORICAL: Settings = {"method": "categorical"}
# The reference settings of the MaskPro paper, with the steps and the batch of all arms.
MASKPRO: Settings = {"method": "maskpro", "preset": "maskpro"}
# Settings that make progress in a short run from a weak prior: four masks a step on the same
# samples, compared with each other.
MASKPRO_SHORT: Settings = {
    "method": "maskpro",
    "prior.mask": "magnitude",
    "maskpro.masks": 4,
    "maskpro.data": "shared",
    "maskpro.baseline": "leave_one_out",
    "maskpro.lr": 2000,
    "maskpro.initial_logit": 9,
}
# The defaults of megamask, to which nothing is added.
DEFAULTS: Settings = {"prior.mask": "sparsegpt"}
ONESHOT = ("magnitude", "wanda", "sparsegpt", "sparsegpt_update")

BASE = "subset-2of4"
_SAME = f"All else as `{BASE}`."
GROUPS: dict[str, Group] = {
    "comparison-2of4": Group("2:4", "categorical-2of4", "Half of the weights."),
    "comparison-1of4": Group(
        "1:4",
        "subset-1of4",
        "A quarter of the weights. A mask keeps one position, so both distributions are the same.",
    ),
    "comparison-4of8": Group(
        "4:8", "subset-4of8", "Half of the weights, 70 masks a group instead of 6."
    ),
    "comparison-8of16": Group(
        "8:16",
        "subset-8of16",
        "Half of the weights, 12,870 masks a group: one logit a weight is the only way.",
    ),
    "prior": Group(
        "Prior (the paper's Table 2)",
        BASE,
        f"The mask that learning starts from. {_SAME} Without one the derived rate differs too.",
    ),
    "kappa": Group("Scale of the logits, kappa (Table 9)", BASE, f"First and last value. {_SAME}"),
    "tau": Group("Temperature, tau (Table 8)", BASE, f"First and last value. {_SAME}"),
    "alpha": Group(
        "Prior strength, alpha (Table 10)",
        BASE,
        f"{_SAME} Without initial noise, alpha in units of std 0.01; the derived rate is "
        "proportional to it.",
    ),
    "weight-norm": Group(
        "Weight-norm term (Tables 3 and 14)",
        BASE,
        f"Coefficient, and whether it falls to 0. {_SAME}",
    ),
    "hard": Group(
        "Soft against hard masks", BASE, f"Hard: one-hot samples with the soft gradient. {_SAME}"
    ),
    "draws": Group(
        "Draws per step", "draws-4", "The same 4 sequences a step, one in each of 4 micro-batches."
    ),
    "optimizer": Group("Optimizer", BASE, _SAME),
    "momentum": Group(
        "Momentum", BASE, f"The decay rate of the mean gradient (the first of `betas`). {_SAME}"
    ),
    "noise": Group(
        "Starting noise",
        BASE,
        f"The paper's N(0, 0.01) logits below the prior, or the prior alone. {_SAME}",
    ),
    "gumbel": Group("Gumbel noise of the soft masks", BASE, _SAME),
    "margins": Group(
        "Start of the logits", BASE, f"{_SAME} With one gap the derived rate is higher."
    ),
    "distillation": Group(
        "Distillation",
        BASE,
        f"The dense model as teacher, at temperature 1. {_SAME} With the layers, the derived rate "
        "of batches below 2,048 tokens is higher.",
    ),
    "rate": Group(
        "Learning rate",
        BASE,
        f"In units of the derived rate. It falls to a tenth along a cosine. {_SAME}",
    ),
    "warmup": Group("Warm-up of the learning rate", BASE, _SAME),
    "eps": Group(
        "AdamW's epsilon",
        BASE,
        f"In units of the clipped gradient's root mean square, beside 1e-8. {_SAME}",
    ),
    "scale": Group(
        "Batch and rate",
        "scale-1-one",
        "The defaults of megamask at multiples of the budget's sequences a step, and at half, once "
        "and twice the rate that megamask derives. Rows have equal steps, not equal tokens.",
    ),
}


def _comparison(pattern: str, learners: dict[str, tuple[str, Settings, Settings]]) -> list[Arm]:
    tag = pattern.replace(":", "of")
    group = f"comparison-{tag}"
    learned = [
        Arm(f"{name}-{tag}", group, label, more, pattern, None, common)
        for name, (label, more, common) in learners.items()
    ]
    return [Arm(f"oneshot-{tag}", group, "one-shot", {}, pattern, None, None), *learned]


_CATEGORICAL: tuple[str, Settings, Settings] = (
    "categorical, a logit per mask",
    CATEGORICAL,
    GRADIENT,
)
_LEAN: tuple[str, Settings, Settings] = (
    "categorical, `lean` state (default: 15 GiB)",
    {**CATEGORICAL, "memory": "lean"},
    GRADIENT,
)
_SUBSET: tuple[str, Settings, Settings] = ("subset, a logit per weight", {}, GRADIENT)
_MASKPRO: tuple[str, Settings, Settings] = ("MaskPro, forward passes only", MASKPRO, {})


def _ablation(
    group: str, rows: dict[str, tuple[str, Settings] | tuple[str, Settings, float]]
) -> list[Arm]:
    return [
        Arm(f"{group}-{name}", group, label, settings, paper=paper[0] if paper else None)
        for name, (label, settings, *paper) in rows.items()
    ]


# Paper: GPT-3 843M on WikiText, 2,000 steps.
ARMS: list[Arm] = [
    *_comparison(
        "2:4",
        {
            "categorical": _CATEGORICAL,
            "subset": _SUBSET,
            "maskpro": _MASKPRO,
            "maskpro-magnitude": (
                "MaskPro from magnitude's mask, 4 masks a step",
                MASKPRO_SHORT,
                {},
            ),
        },
    ),
    *_comparison("1:4", {"categorical": _CATEGORICAL, "subset": _SUBSET, "maskpro": _MASKPRO}),
    *_comparison("4:8", {"subset": _SUBSET, "categorical": _LEAN, "maskpro": _MASKPRO}),
    *_comparison("8:16", {"subset": _SUBSET, "maskpro": _MASKPRO}),
    *_ablation(
        "prior",
        {
            "sparsegpt": ("SparseGPT", {"prior.mask": "sparsegpt"}, 15.39),
            "wanda": ("Wanda", {"prior.mask": "wanda"}, 16.39),
            "magnitude": ("magnitude", {"prior.mask": "magnitude"}, 16.07),
            "none": (
                "none: N(0, 0.01) logits",
                {"prior.mask": None, "sampling.initial_noise": True},
                18.62,
            ),
        },
    ),
    *_ablation(
        "kappa",
        {
            "1": ("1 to 5", {"sampling.kappa": [1, 5]}, 5.97e6),
            "1e2": ("1e2 to 5e2", {"sampling.kappa": [100, 500]}, 15.39),
            "1e3": ("1e3 to 5e3", {"sampling.kappa": [1000, 5000]}, 15.59),
            "1e5": ("1e5 to 5e5", {"sampling.kappa": [100000, 500000]}, 24.81),
        },
    ),
    *_ablation(
        "tau",
        {
            "1": ("1 to 0.05", {"sampling.tau": [1, 0.05]}, 17.52),
            "2": ("2 to 0.05", {"sampling.tau": [2, 0.05]}, 16.69),
            "4": ("4 to 0.05", {"sampling.tau": [4, 0.05]}, 15.39),
            "10": ("10 to 0.05", {"sampling.tau": [10, 0.05]}, 15.68),
        },
    ),
    *_ablation(
        "alpha",
        {
            "1": ("1", {"prior.strength": 1}, 23.65),
            "2": ("2", {"prior.strength": 2}, 15.59),
            "3": ("3", {"prior.strength": 3}, 15.39),
            "5": ("5", {"prior.strength": 5}, 15.48),
        },
    ),
    *_ablation(
        "weight-norm",
        {
            "off": ("off", {"weight_norm": [0, 0]}),
            "annealed": (
                "1e-5, falling to 0",
                {"weight_norm": [1e-5, 0]},
            ),
            "on": ("1e-5, constant", {"weight_norm": [1e-5, 1e-5]}),
            "strong": ("1e-4, constant", {"weight_norm": [1e-4, 1e-4]}),
        },
    ),
    *_ablation(
        "hard",
        {"soft": ("soft", {"sampling.mode": "soft"}), "hard": ("hard", {"sampling.mode": "hard"})},
    ),
    *_ablation(
        "draws",
        {
            "4": (
                "one per micro-batch: 4",
                {"micro_batch": 1, "sampling.draws": "micro_batch", "sampling.noise": 1},
            ),
            "1": (
                "one per step",
                {"micro_batch": 1, "sampling.draws": "step", "sampling.noise": 1},
            ),
        },
    ),
    *_ablation(
        "optimizer",
        {
            "adamw": ("AdamW", {"optimizer.kind": "adamw"}),
            "adamw-bf16": ("AdamW with bf16 state (`lean`)", {"memory": "lean"}),
            "adamw8bit": ("AdamW, 8 bits (CUDA)", {"optimizer.kind": "adamw8bit"}),
        },
    ),
    Arm(
        "optimizer-lion",
        "optimizer",
        "Lion, whose derived rate is a third",
        {"optimizer.kind": "lion", "optimizer.betas": [0.9, 0.99]},
    ),
    Arm(
        "optimizer-lion8bit",
        "optimizer",
        "Lion, 8 bits (`leanest`), whose derived rate is a third",
        {"memory": "leanest", "optimizer.kind": "lion8bit"},
    ),
    *_ablation(
        "momentum",
        {
            "derived": ("derived from the steps", {}),
            **{
                f"{rate:g}": (f"{rate:g}", {"optimizer.betas": [rate, 0.95]})
                for rate in (0.9, 0.8, 0.6, 0)
            },
        },
    ),
    *_ablation(
        "noise",
        {
            "off": ("the prior alone", {"sampling.initial_noise": False}),
            "on": ("the paper's: noise and prior", {"sampling.initial_noise": True}),
        },
    ),
    *_ablation(
        "gumbel",
        {
            "0": ("none: the masks of the logits alone", {}),
            "1": ("the paper's", {"sampling.noise": 1}),
        },
    ),
    *_ablation(
        "margins",
        {
            "on": ("each weight at its margin", {}),
            "off": ("one gap for all groups", {"prior.margins": False}),
        },
    ),
    *_ablation(
        "distillation",
        {
            "lm": ("the text's loss", {}),
            "hidden": ("the text's loss and the layers", {"distillation.hidden": 1}),
            "kd": ("the teacher's distribution", {"distillation.share": 1}),
            "mix": ("half of each", {"distillation.share": 0.5}),
        },
    ),
    Arm(
        "distillation-kd-time",
        "distillation",
        "the teacher's, in the time of the text's",
        {"distillation.share": 1},
        share_of_steps=0.8,
    ),
    Arm("rate-quarter", "rate", "a quarter of the reference's", rate=0.25),
    Arm("rate-half", "rate", "half", rate=0.5),
    Arm("rate-one", "rate", "the reference's"),
    Arm("rate-twice", "rate", "twice", rate=2),
    *_ablation(
        "warmup",
        {"tenth": ("a tenth of the steps", {}), "none": ("none", {"optimizer.warmup_steps": 0})},
    ),
    *_ablation(
        "eps",
        {
            "0": ("0", {"optimizer.epsilon": [1e-8, 0.0]}),
            "0.03": ("0.03", {"optimizer.epsilon": [1e-8, 0.03]}),
            "0.1": ("0.1", {"optimizer.epsilon": [1e-8, 0.1]}),
            "0.3": ("0.3", {"optimizer.epsilon": [1e-8, 0.3]}),
        },
    ),
    *(
        Arm(
            f"scale-{batch}-{name}",
            "scale",
            f"{batch} x the batch, {rate:g} x the rate",
            common=DEFAULTS,
            rate=rate,
            batch=batch,
        )
        for batch in (1, 4, 16, 64)
        for name, rate in (("half", 0.5), ("one", 1.0), ("twice", 2.0))
    ),
]


def by_name() -> dict[str, Arm]:
    """Arms by name."""
    return {arm.name: arm for arm in ARMS}


assert len(by_name()) == len(ARMS) and all(arm.group in GROUPS for arm in ARMS)
assert all(str(Pattern.parse(arm.pattern)) == arm.pattern for arm in ARMS)
