"""The chapters of the report: which rows stand in a table, and which job gives each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from studies.evidence.job import Job, Words

PATTERNS = ("2:4", "4:8", "6:8", "4:8:pair")
ALL_METHODS = (
    "magnitude",
    "wanda",
    "ria",
    "gblm",
    "pruner_zero",
    "sparsegpt",
    "admm",
    "sparsegpt_update",
    "admm_update",
)
# The methods at every pattern, the prior of learning among them.
SOME_METHODS = ("magnitude", "wanda", "sparsegpt", "admm", "sparsegpt_update")
AT_2_4 = "pattern=2:4"
POLISHED = ("wanda", "ria", "sparsegpt")
STEPS = 60  # of 4 x 256 tokens, the batch of the quickstart
SHORT = 20


@dataclass(frozen=True)
class Line:
    """A row of a table.

    Attributes:
        label: its first cell.
        job: where it was measured.
        row: its name in the job's ``results.json``.
    """

    label: str
    job: Job
    row: str = "learned"


@dataclass(frozen=True)
class Chapter:
    """A table of the report; ``text`` says what varies."""

    name: str
    title: str
    text: str
    lines: Sequence[Line]


def oneshot(pattern: str, methods: Sequence[str], more: Words = (), name: str = "oneshot") -> Job:
    """One-shot masks of a pattern, evaluated."""
    settings = (f"pattern={pattern}", f"prune.methods=[{', '.join(methods)}]", *more)
    tag = pattern.replace(":", "-")
    return Job(f"{name}-{tag}", (("prune", ()), ("evaluate", ())), settings)


def learned(
    name: str, prior: Job | None, steps: int, settings: Words = (), mask: str = "sparsegpt"
) -> Job:
    """A mask learned from a mask of ``prior``; the rows of its results are the prior's and
    ``learned``.
    """
    pattern = tuple(word for word in prior.settings if "pattern=" in word) if prior else (AT_2_4,)
    start = (f"learn.prior.mask={mask}",) if prior else ("learn.prior.mask=null",)
    return Job(
        name,
        (("learn", ()), ("evaluate", ())),
        (*pattern, f"learn.steps={steps}", "learn.monitor.evaluate_every=0", *start, *settings),
        {mask: prior} if prior else {},
        is_seeded=True,
    )


def on_reordered(name: str, words: Words) -> list[Line]:
    """The rows of a model whose channels were reordered."""
    written = Job(f"{name}-model", (("reorder", ("{run}/reordered", *words)),), (AT_2_4,))
    verbs = tuple((verb, ()) for verb in ("convert", "prune", "learn", "evaluate"))
    settings = (AT_2_4, "prune.methods=[wanda, sparsegpt]", "learn.monitor.evaluate_every=0")
    jobs = {
        steps: Job(tag, verbs, (*settings, f"learn.steps={steps}"), model=written, is_seeded=True)
        for steps, tag in ((SHORT, f"{name}-{SHORT}"), (STEPS, name))
    }
    polished = replace(
        jobs[SHORT],
        name=f"{name}-polished-{SHORT}",
        settings=(*jobs[SHORT].settings, "prune.methods=[sparsegpt]", "prune.polish=3"),
    )
    title = name.replace("-", ", ")
    return [
        Line(f"{title}: dense", jobs[STEPS], "dense"),
        Line(f"{title}: Wanda mask", jobs[STEPS], "wanda"),
        Line(f"{title}: SparseGPT mask", jobs[STEPS], "sparsegpt"),
        *(Line(f"{title}: learned, {steps} steps", job) for steps, job in jobs.items()),
        Line(f"{title}: learned from the mask polished in 3 sweeps, {SHORT} steps", polished),
    ]


ONESHOT = {
    pattern: oneshot(pattern, ALL_METHODS if pattern == "2:4" else SOME_METHODS)
    for pattern in PATTERNS
}
WIDE = {pattern: oneshot(pattern, ("sparsegpt",)) for pattern in ("1:4", "8:16")}
BASE = ONESHOT["2:4"]
POLISH = oneshot("2:4", POLISHED, ("prune.polish=20",), "polish")
START = oneshot("2:4", ("wanda", "sparsegpt"), ("prune.polish=3",), "polish-3")  # for learning
POLISHED_STARTS = {
    steps: learned(f"learn-polished-{steps}", START, steps) for steps in (SHORT, STEPS, 240)
}
BUDGETS = {steps: learned(f"learn-2-4-{steps}", BASE, steps) for steps in (SHORT, STEPS, 240)}
MAIN = BUDGETS[STEPS]
MINUTES = learned("learn-minutes", BASE, 128, ("learn.preset=minutes", "learn.global_batch=16"))

SCHEDULES: dict[str, tuple[str, Words]] = {
    "exponential": ("kappa and tau by equal factors", ("learn.sampling.schedule=exponential",)),
    "early": (
        "by equal differences, done after three quarters",
        ("learn.sampling.annealed_by=0.75",),
    ),
    "exponential-early": (
        "by equal factors, done after three quarters",
        ("learn.sampling.schedule=exponential", "learn.sampling.annealed_by=0.75"),
    ),
}
NO_PRIOR: dict[str, tuple[str, Words]] = {
    "no-prior": (
        "no prior: equal differences",
        ("learn.sampling.noise=1", "learn.sampling.initial_noise=true"),
    ),
    "no-prior-roi": ("no prior: preset `roi`", ("learn.preset=roi", "learn.global_batch=4")),
}
RECOVERIES = ("reconstruct", "blockwise", "finetune", "lora")


def recovery(method: str) -> Job:
    """Kept weights recovered under the learned mask, at the tokens of its learning."""
    words = (f"recover.method={method}", "recover.global_batch=4", f"recover.steps={STEPS}")
    return Job(
        f"recover-{method}",
        (("recover", words), ("evaluate", ())),
        (AT_2_4,),
        masks={"learned": MAIN},
        is_seeded=True,
    )


SENSITIVITY = Job(
    "sensitivity",
    (("sensitivity", ("sensitivity.mask=sparsegpt", "sensitivity.rows=[0, 1, 3, 6, 9]")),),
    (AT_2_4,),
    masks={"sparsegpt": BASE},
)

CHAPTERS = [
    Chapter(
        "budgets",
        "Budgets at 2:4",
        "Masks of frozen weights, learned with the settings of the quickstart: no setting but the "
        "number of steps differs, but for the preset's batch.",
        [
            Line("dense", MAIN, "dense"),
            Line("SparseGPT mask", MAIN, "sparsegpt"),
            *(Line(f"learned, {steps} steps", job) for steps, job in BUDGETS.items()),
            Line("learned, 128 steps of 16 sequences (preset `minutes`)", MINUTES),
            Line("SparseGPT mask, polished", POLISHED_STARTS[STEPS], "sparsegpt, polished"),
            *(
                Line(f"learned from it, {steps} steps", job)
                for steps, job in POLISHED_STARTS.items()
            ),
        ],
    ),
    Chapter(
        "patterns",
        "Patterns",
        f"SparseGPT's mask, and the mask learned from it in {STEPS} steps.",
        [
            line
            for pattern, prior in {**ONESHOT, **WIDE}.items()
            for line in (
                Line(f"{pattern}, SparseGPT mask", prior, "sparsegpt"),
                Line(
                    f"{pattern}, learned",
                    MAIN
                    if prior is BASE
                    else learned(f"learn-{pattern.replace(':', '-')}-{STEPS}", prior, STEPS),
                ),
            )
        ],
    ),
    Chapter(
        "priors",
        "Priors after equal short learning (MaskLLM, Table 2)",
        f"{SHORT} steps from each one-shot mask of 2:4 and its margins.",
        [
            Line(
                f"from {method}",
                BUDGETS[SHORT]
                if method == "sparsegpt"
                else learned(f"prior-{method}", BASE, SHORT, mask=method),
            )
            for method in ALL_METHODS
            if not method.endswith("_update")
        ]
        + [
            Line(
                f"from {method}, polished in 3 sweeps",
                POLISHED_STARTS[SHORT]
                if method == "sparsegpt"
                else learned(f"prior-{method}-polished", START, SHORT, mask=method),
            )
            for method in ("wanda", "sparsegpt")
        ],
    ),
    Chapter(
        "schedules",
        "Schedules of kappa and tau",
        f"{STEPS} steps at 2:4. The reference goes by equal differences over all steps.",
        [
            Line("reference", MAIN),
            *(
                Line(label, learned(f"schedule-{name}", BASE, STEPS, words))
                for name, (label, words) in SCHEDULES.items()
            ),
            *(
                Line(label, learned(f"schedule-{name}", None, STEPS, words))
                for name, (label, words) in NO_PRIOR.items()
            ),
        ],
    ),
    Chapter(
        "reorder",
        "Reordered and rotated channels",
        "`megamask reorder` writes a model of the same function and architecture; everything after "
        "it ran as on any model.",
        [
            Line("as published: dense", MAIN, "dense"),
            Line("as published: Wanda mask", BASE, "wanda"),
            Line("as published: SparseGPT mask", MAIN, "sparsegpt"),
            *(
                Line(f"as published: learned, {steps} steps", BUDGETS[steps])
                for steps in (SHORT, STEPS)
            ),
            *on_reordered("reordered", ()),
            *on_reordered("reordered-rotated", ("--rotate-values",)),
        ],
    ),
    Chapter(
        "recovery",
        "Recovery under the learned mask",
        f"The mask of {STEPS} steps stays and its kept weights change: these are other models, and "
        "the first row is the result of the frozen weights. `finetune` and `lora` read as many "
        "tokens as learning did.",
        [
            Line("frozen weights", recovery(RECOVERIES[0])),
            *(
                Line(method, recovery(method), f"recovered (learned + {method})")
                for method in RECOVERIES
            ),
        ],
    ),
]
# What the names of rows have behind the method -> pattern -> the job.
MATRIX = {"": ONESHOT, ", polished": {"2:4": POLISH}}


def all_jobs() -> list[Job]:
    """Every job, sources first."""
    found: dict[str, Job] = {}

    def add(job: Job) -> None:
        for source in job.sources:
            add(source)
        found.setdefault(job.name, job)

    lines = [line.job for chapter in CHAPTERS for line in chapter.lines]
    for job in [*ONESHOT.values(), POLISH, *lines, SENSITIVITY]:
        add(job)
    return list(found.values())
