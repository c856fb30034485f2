"""The arguments of verbs that are no settings, a dataclass a verb. It imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megamask.verbs.argument_field import Arguments, argument


@dataclass(frozen=True, kw_only=True)
class PlanArguments(Arguments):
    """What the verb plan is asked."""

    model: str | None = argument(
        "--model NAME",
        "a shape such as llama2-7b, a Hugging Face folder or a config.json",
        None,
        is_path=True,
    )
    dp: int = argument("--dp N", "replicas: number of devices / parallel.tp", 1, kind=int)
    gpu: str | None = argument(
        "--gpu NAME",
        "device that must hold the run; any GPU where it is not given",
        None,
        choices=("a100-40", "a100", "h100", "h200", "cpu"),
    )
    search: int | None = argument(
        "--search GPUS",
        "list the layouts with the fewest GPU-hours on so many GPUs",
        None,
        kind=int,
    )
    calibrate: str | None = argument(
        "--calibrate FILE",
        "measured rates of a GPU, of benchmarks.gpu.ceilings --json",
        None,
        is_path=True,
    )
    json: str | None = argument("--json FILE", "write the figures to FILE", None, is_path=True)


@dataclass(frozen=True, kw_only=True)
class DiffArguments(Arguments):
    """What the verb diff compares."""

    a: str = argument("A", "mask, named as learn.prior.mask", is_path=True)
    b: str = argument("B", "the other mask, likewise", is_path=True)
    json: str | None = argument("--json FILE", "write the figures to FILE", None, is_path=True)
    picture: str | None = argument(
        "--picture FILE.png",
        "draw the groups that differ, kinds of linears x layers",
        None,
        is_path=True,
    )


@dataclass(frozen=True, kw_only=True)
class ExtractArguments(Arguments):
    """What the verb extract writes."""

    snapshot: str = argument(
        "SNAPSHOT", "snapshot or mask, named as learn.prior.mask", is_path=True
    )
    file: str = argument("FILE", "mask file to write, *.safetensors", is_path=True)
    coding: str = argument(
        "--coding NAME",
        "words (as learn writes), uniform (3 % smaller) or given-weights (smallest, and read with "
        "the base model alone)",
        "words",
        choices=("words", "uniform", "given-weights"),
    )


@dataclass(frozen=True, kw_only=True)
class ImportArguments(Arguments):
    """What the verb import reads and writes."""

    source: str = argument(
        "SOURCE",
        "masks of MaskLLM, PATCH, MaskPro or ProxSparse, or the folder of a pruned model",
        is_path=True,
    )
    out: str = argument("OUT", "mask file to write, *.safetensors", is_path=True)


@dataclass(frozen=True, kw_only=True)
class PushArguments(Arguments):
    """What the verb push uploads."""

    repo: str = argument("REPO", "repository of the Hugging Face Hub, OWNER/NAME")
    what: str = argument(
        "--what KIND", "mask: the mask alone; model: the masked model", "mask", ("mask", "model")
    )
    base_name: str | None = argument(
        "--base-name OWNER/NAME", "name of the base model on the Hub, for the card", None
    )
    private: bool = argument("--private", "make a new repository private", False, kind=bool)
    dry_run: bool = argument(
        "--dry-run", "write and list what would be uploaded, and upload nothing", False, kind=bool
    )


@dataclass(frozen=True, kw_only=True)
class ReorderArguments(Arguments):
    """What the verb reorder writes."""

    out: str = argument("OUT", "Hugging Face folder to write", is_path=True)
    rotate_values: bool = argument(
        "--rotate-values", "also rotate the value channels of each KV head", False, kind=bool
    )


@dataclass(frozen=True, kw_only=True)
class ReportArguments(Arguments):
    """Which runs the verb report shows."""

    runs: tuple[str, ...] = argument(
        "RUN ...",
        "run folder; the setting run_dir by default. Several are compared on one page",
        (),
        many=True,
        is_path=True,
    )
    out: str | None = argument(
        "--out FILE.html", "page of the comparison; comparison.html by default", None, is_path=True
    )

    @property
    def comparison(self) -> Path | None:
        """The page of a comparison; None where the report of one run is asked for."""
        is_one = len(self.runs) < 2 and self.out is None
        return None if is_one else Path(self.out or "comparison.html")

    @property
    def run(self) -> str | None:
        """The folder that the page is written to, where it is not the setting ``run_dir``."""
        if self.comparison is not None:
            return str(self.comparison.parent)
        return self.runs[0] if self.runs else None


@dataclass(frozen=True, kw_only=True)
class SpeedArguments(Arguments):
    """What the verb speed measures, unless it is an exported folder."""

    model: str | None = argument(
        "--model NAME",
        "a shape such as llama2-7b, a Hugging Face folder or a config.json: measure its linears "
        "with random 2:4 weights, and generate nothing",
        None,
        is_path=True,
    )


@dataclass(frozen=True, kw_only=True)
class InspectArguments(Arguments):
    """What the verb inspect reads."""

    mask: str | None = argument(
        "MASK",
        "mask, named as learn.prior.mask; export.mask or the learned mask by default",
        None,
        is_path=True,
    )


@dataclass(frozen=True, kw_only=True)
class SettingsArguments(Arguments):
    """What the verb settings prints."""

    prefix: str | None = argument(
        "PREFIX", "section or setting, such as learn.sampling; all settings by default", None
    )
    markdown: bool = argument("--markdown", "print docs/settings.md", False, kind=bool)


@dataclass(frozen=True, kw_only=True)
class RecipesArguments(Arguments):
    """What the verb recipes prints."""

    name: str | None = argument("NAME", "recipe to print; a list of all recipes by default", None)


@dataclass(frozen=True, kw_only=True)
class SubmitArguments(Arguments):
    """What the verb submit starts."""

    verb: str = argument(
        "VERB",
        "verb to run as a job; learn by default",
        "learn",
        choices=("convert", "tokenize", "prune", "learn", "evaluate", "export"),
    )
    dry_run: bool = argument(
        "--dry-run", "print the job's script and start nothing", False, kind=bool
    )


@dataclass(frozen=True, kw_only=True)
class StatusArguments(Arguments):
    """Which run the verb status looks at."""

    run: str | None = argument(
        "RUN", "run folder; the setting run_dir by default", None, is_path=True
    )
    json: bool = argument("--json", "print JSON", False, kind=bool)


@dataclass(frozen=True, kw_only=True)
class StopArguments(Arguments):
    """Which run the verb stop ends."""

    run: str | None = argument(
        "RUN", "run folder; the setting run_dir by default", None, is_path=True
    )
