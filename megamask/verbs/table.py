"""The verbs of the command line: what each does, which settings it reads and which arguments of
its own (``own_arguments.py``) it takes. Nothing here imports torch: ``--help`` answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, Field, dataclass, field, fields
from typing import Any

from megamask.verbs.argument_field import words_of
from megamask.verbs.own_arguments import (
    DiffArguments,
    ExtractArguments,
    ImportArguments,
    InspectArguments,
    PlanArguments,
    PushArguments,
    RecipesArguments,
    ReorderArguments,
    ReportArguments,
    SettingsArguments,
    SpeedArguments,
    StatusArguments,
    StopArguments,
    SubmitArguments,
)


@dataclass(frozen=True)
class Verb:
    """One verb.

    Attributes:
        module: where its ``run(config)`` is, or ``run(config, arguments)`` with arguments.
        summary: one line for the list of verbs.
        sections: dotted sections and settings that it reads.
        arguments: dataclass of its own arguments.
        shortcuts: flags that stand for settings.
        writes: artefacts that it alone may touch while it runs, as names of ``RunPaths``, of its
            arguments, or of files of the run folder.
        reads: artefacts that must not change while it runs, named likewise.
        is_parallel: whether the ranks of a job work on it together; otherwise rank 0 does it alone.
        saves_on_signal: whether ``run`` takes a request to stop and saves before it leaves;
            otherwise a signal stops the verb where it is.
    """

    module: str
    summary: str
    sections: tuple[str, ...]
    arguments: type[Any] | None = None
    shortcuts: Mapping[str, str] = field(default_factory=dict)
    _: KW_ONLY
    writes: tuple[str, ...]
    reads: tuple[str, ...] = ()
    is_parallel: bool = False
    saves_on_signal: bool = False

    @property
    def fields(self) -> tuple[Field[Any], ...]:
        """The fields of ``arguments``, in order."""
        return fields(self.arguments) if self.arguments else ()

    @property
    def positional(self) -> list[Field[Any]]:
        """Arguments that are known by their place."""
        return [one for one in self.fields if not words_of(one).startswith("-")]

    @property
    def flags(self) -> dict[str, Field[Any]]:
        """Arguments that are known by their flag."""
        return {
            words_of(one).partition(" ")[0]: one
            for one in self.fields
            if words_of(one).startswith("-")
        }


PATTERNS = ("pattern", "pattern_overrides")
EVERYWHERE = ("run_dir", "device", "deterministic", "dtype", "parallel")
WINDOWS = ("evaluate.window", "evaluate.max_tokens", "evaluate.bos")
LEARNING = ("seed", *PATTERNS, "model", "data", "learn", *WINDOWS)
TASKS = ("evaluate.masks", "evaluate.micro_batch", "tasks")
RECOVERY = (*WINDOWS, "evaluate.micro_batch", "recover")
VERBS: dict[str, Verb] = {
    "gguf": Verb(
        "megamask.verbs.gguf",
        "unpack a GGUF file into a Hugging Face folder",
        ("run_dir", "model.hf", "model.gguf"),
        writes=("hf",),
    ),
    "convert": Verb(
        "megamask.verbs.convert",
        "Hugging Face folder or Megatron checkpoint -> weights for any tensor parallel size",
        ("run_dir", "device", "parallel", "model.hf", "model.megatron"),
        writes=("weights",),
        reads=("hf",),
        is_parallel=True,
    ),
    "tokenize": Verb(
        "megamask.verbs.tokenize",
        "text domains -> token shards, some documents held out for evaluation",
        ("run_dir", "model.hf", "data"),
        writes=("shards",),
    ),
    "reorder": Verb(
        "megamask.verbs.reorder",
        "model -> a Hugging Face folder with its channels in an order that prunes better",
        (*EVERYWHERE, *PATTERNS, "model", "data", "calibration"),
        ReorderArguments,
        writes=("out",),
        reads=("hf", "shards"),
        is_parallel=True,
    ),
    "prune": Verb(
        "megamask.verbs.prune",
        "one-shot masks: magnitude, Wanda, SparseGPT",
        (*EVERYWHERE, *PATTERNS, "model", "data", "calibration", "prune"),
        writes=("masks",),
        reads=("weights", "shards"),
        is_parallel=True,
    ),
    "plan": Verb(
        "megamask.verbs.plan",
        "memory, time and GPU-hours of a learning run, before anything is launched",
        (
            *("run_dir", "dtype", *PATTERNS, "model", "parallel", "data.seq_length"),
            *("learn", "evaluate.window"),
        ),
        PlanArguments,
        {
            "--pattern": "pattern",
            "--tp": "parallel.tp",
            "--micro": "learn.micro_batch",
            "--global-batch": "learn.global_batch",
            "--seq": "data.seq_length",
            "--steps": "learn.steps",
            "--memory": "learn.memory",
            "--footprint": "learn.footprint",
        },
        writes=("json",),
    ),
    "learn": Verb(
        "megamask.verbs.learn",
        "learn the mask of the frozen model; resumes from the last snapshot",
        (*EVERYWHERE, *LEARNING, "evaluate.micro_batch"),
        writes=("learn",),
        reads=("weights", "shards"),
        is_parallel=True,
        saves_on_signal=True,
    ),
    "evaluate": Verb(
        "megamask.verbs.evaluate",
        "perplexity of the dense model and of every mask: held-out text, or WikiText-2",
        (*EVERYWHERE, *PATTERNS, "model", "data", "evaluate"),
        writes=("results",),
        reads=("weights", "shards"),
        is_parallel=True,
    ),
    "tasks": Verb(
        "megamask.verbs.tasks",
        "accuracy of the dense model and of every mask on tasks of lm-evaluation-harness",
        (*EVERYWHERE, *PATTERNS, "model", "data.tokenizer", "data.bos", *TASKS),
        writes=("tasks.json", "tasks.md"),
        reads=("weights",),
        is_parallel=True,
    ),
    "sensitivity": Verb(
        "megamask.verbs.sensitivity",
        "loss increase when one layer or linear alone is pruned, and which to keep dense",
        (*EVERYWHERE, *PATTERNS, "model", "data", "evaluate", "sensitivity"),
        writes=("sensitivity.json", "sensitivity.md", "sensitivity.png"),
        reads=("weights", "shards"),
        is_parallel=True,
    ),
    "export": Verb(
        "megamask.verbs.export",
        "model + mask file -> masked Hugging Face folder or Megatron checkpoint, or a mask archive",
        ("run_dir", *PATTERNS, "model.hf", "model.megatron", "export"),
        shortcuts={"--to": "export.format"},
        writes=("export",),
        reads=("hf",),
    ),
    "recover": Verb(
        "megamask.verbs.recover",
        "new values of the weights that a mask keeps -> a model of its own, labelled recovered",
        (*EVERYWHERE, "seed", *PATTERNS, "model", "data", "calibration", *RECOVERY),
        writes=("masks", "recovered"),
        reads=("weights", "shards", "hf"),
        is_parallel=True,
    ),
    "push": Verb(
        "megamask.verbs.push",
        "mask or masked model -> the Hugging Face Hub, with a card of what was measured",
        ("run_dir", *PATTERNS, "model.hf", "model.megatron", "export.mask"),
        PushArguments,
        writes=("push",),
        reads=("hf",),
    ),
    "speed": Verb(
        "megamask.verbs.speed",
        "times of dense and 2:4 products on this GPU, and the rate of generation with both",
        ("run_dir", "device", "model.ignore_keys", "export.out", "speed"),
        SpeedArguments,
        writes=("speed.json", "speed.md", "speed.png"),
        reads=("export",),
    ),
    "report": Verb(
        "megamask.verbs.report",
        "pictures and report.html of a run, or one page that compares several runs",
        ("run_dir", "seed", "model", "calibration.seed", "learn.prior.mask"),
        ReportArguments,
        writes=("report.html", "comparison"),
    ),
    "inspect": Verb(
        "megamask.verbs.inspect",
        "print a mask file and verify it strictly",
        ("run_dir", "model.hf", "model.megatron", "export.mask"),
        InspectArguments,
        writes=(),
    ),
    "diff": Verb(
        "megamask.verbs.diff",
        "how two masks differ, by layer and by kind of linear",
        ("run_dir", "model.hf"),
        DiffArguments,
        writes=("json", "picture"),
    ),
    "extract": Verb(
        "megamask.verbs.extract",
        "the hard masks of a snapshot, or any mask -> mask file",
        ("run_dir", "model.hf", "model.megatron"),
        ExtractArguments,
        writes=("file",),
    ),
    "import": Verb(
        "megamask.verbs.import_masks",
        "masks of another tool + their base model -> mask file",
        ("run_dir", *PATTERNS, "model.hf", "model.megatron"),
        ImportArguments,
        {"--base": "model.hf", "--pattern": "pattern"},
        writes=("out",),
        reads=("hf",),
    ),
    "settings": Verb(
        "megamask.verbs.settings",
        "every setting with its default, its range and its meaning",
        (),
        SettingsArguments,
        writes=(),
    ),
    "recipes": Verb(
        "megamask.verbs.recipes",
        "the recipes that come with the program",
        (),
        RecipesArguments,
        writes=(),
    ),
    "submit": Verb(
        "megamask.verbs.submit",
        "start a verb as a job: under Slurm, or under torchrun in the background",
        ("run_dir", "device", "parallel.tp", "launch"),
        SubmitArguments,
        {
            f"--{name.replace('_', '-')}": f"launch.{name}"
            for name in (
                *("nodes", "processes_per_node", "time", "account", "partition", "qos"),
                *("container", "retries"),
            )
        },
        writes=("launch",),
    ),
    "status": Verb(
        "megamask.verbs.status",
        "where a learning run stands: step, pace, perplexity, snapshot, job",
        ("run_dir",),
        StatusArguments,
        writes=(),
    ),
    "stop": Verb(
        "megamask.verbs.stop",
        "save a snapshot of a learning run and end its job for good",
        ("run_dir",),
        StopArguments,
        writes=(),
    ),
}
