"""Every setting, its default and its range. Sections are frozen: nothing changes a setting after
it was read. Some sections have files of their own, such as learn_tree.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from megamask.config.export_tree import ExportSection
from megamask.config.launch_tree import LaunchSection
from megamask.config.learn_tree import LearnSection
from megamask.config.model_tree import ModelSection
from megamask.config.presets import layered
from megamask.config.recover_tree import RecoverSection
from megamask.config.section import (
    Batch,
    Ranks,
    Rate,
    Samples,
    Section,
    Seed,
    Share,
    Tokens,
    UserPath,
    by_content,
    free,
)  # fmt: skip
from megamask.config.sensitivity_tree import SensitivitySection
from megamask.config.speed_tree import SpeedSection
from megamask.config.tasks_tree import TasksSection
from megamask.errors import ConfigError

MAX_SAMPLES = 10**8


def _not_tiny(weight: float) -> float:
    if 0 < weight < 1e-6:
        raise ValueError("a weight is 0, or at least 1e-6")
    return weight


Weight = Annotated[float, Field(ge=0, le=1e6), AfterValidator(_not_tiny)]


class ParallelSection(Section):
    """How the job is laid out. The number of replicas is world size / tp."""

    tp: Ranks = free(1, description="tensor parallel size: ranks that share every layer")
    sequence_parallel: bool = free(
        False, description="split activations between layers over the tensor parallel ranks"
    )
    recompute: Literal[False, True, "mlp"] = free(
        False,
        description="make activations again in the backward pass: true, those of each layer; "
        "mlp, those of its feed-forward part",
    )
    fused: bool = free(
        True,
        description="on CUDA with Triton: one pass each for the rotation and SwiGLU of a model; "
        "false takes separate passes, with the same results",
    )
    start_minutes: Annotated[int, Field(ge=1, le=100_000)] = free(
        10, description="how long a rank waits for the others to start and to connect"
    )
    first_step_minutes: Annotated[int, Field(ge=1, le=100_000)] = free(
        10,
        description="how long a micro-batch may take in the first step of a start, and in the "
        "evaluation before it; kernels are compiled meanwhile",
    )
    timeout_minutes: Annotated[int, Field(ge=1, le=100_000)] = free(
        30, description="how long a rank waits for the others later, and for a micro-batch"
    )
    threads: int | None = free(
        None,
        ge=1,
        le=1024,
        description="CPU threads of a rank; null divides the cores among local ranks",
    )


class CorpusSection(Section):
    """One text domain. ``kind`` says where its documents come from."""

    kind: Literal["stdlib", "pydocs", "text", "jsonl", "parquet", "files", "hf", "megatron"]
    path: UserPath | None = Field(
        None,
        description="file, folder or glob (text, jsonl, parquet; files: each by the ending of its "
        "name), dataset name (hf), or path of .bin and .idx files without the ending (megatron)",
    )
    config: str | None = Field(None, description="dataset configuration (hf)")
    split: str = Field("train", description="dataset split (hf)")
    field: str = Field("text", description="column that holds the text (jsonl, parquet, files, hf)")
    join: str | None = Field(
        None,
        description="make one document of all rows, with this text between them; WikiText's rows "
        "are paragraphs, and its usual protocol joins them with two line feeds",
    )
    max_bytes: int | None = Field(None, ge=1, le=10**15, description="stop after this much text")
    heldout: Share = Field(0.05, description="share of documents kept for evaluation")


class DataSection(Section):
    """Text domains, how they are tokenized and how they are blended for learning."""

    tokenizer: UserPath | None = by_content(
        None,
        description="Hugging Face tokenizer folder or sentencepiece .model file; null = model.hf",
    )
    domains: dict[str, CorpusSection] = Field(
        default_factory=dict, description="name -> corpus: kind, path, config, split (train), "
        "field (text), join, max_bytes (null), heldout (0.05, documents kept for evaluation)"
    )  # fmt: skip
    blend: dict[str, Weight] = Field(
        default_factory=dict,
        description="domain -> weight; what is left out is not learned from; empty = equal weights",
    )
    seq_length: Tokens = Field(256, description="tokens of a sample")
    eod: str | None = Field(
        "auto",
        description="token that ends a document; auto = the tokenizer's EOS, null = no token",
    )
    bos: Literal["auto", True, False] = Field(
        "auto",
        description="begin each document and each calibration sample with the tokenizer's BOS; "
        "auto = where the tokenizer puts one before a prompt",
    )
    processes: Annotated[int, Field(ge=1, le=1024)] | None = free(
        None, description="processes that tokenize; null = one for each core"
    )


class CalibrationSection(Section):
    """Samples for the one-shot criteria, drawn from the training blend."""

    samples: Samples = Field(32, description="number of samples")
    seq_length: Tokens = Field(512, description="tokens of a sample")
    micro_batch: Batch = free(4, description="samples of one forward pass")
    seed: Seed = Field(0, description="seed of the draw")


MaskOnly = Literal["magnitude", "wanda", "ria", "gblm", "pruner_zero", "sparsegpt", "admm"]
OneShotMethod = Literal[MaskOnly, "sparsegpt_update", "admm_update"]


class PruneSection(Section):
    """One-shot masks. ``sparsegpt_update`` and ``admm_update`` also write updated weights, as a
    comparison.
    """

    methods: list[OneShotMethod] = Field(
        ["magnitude", "wanda", "sparsegpt", "sparsegpt_update"], description="masks to make"
    )
    inputs: Literal["pruned", "dense"] = Field(
        "pruned",
        description="inputs of a layer: the outputs of the pruned layers before it, a pass for "
        "each method; or of the dense layers, one pass for all methods",
    )
    damp: Rate = Field(
        0.01, description="SparseGPT: share of the mean diagonal added to the Hessian"
    )
    block: Annotated[int, Field(ge=1, le=2**20)] = Field(
        128, description="SparseGPT: columns of a lazy update block, a multiple of M"
    )
    gradual: Annotated[int, Field(ge=0, le=20)] = Field(
        15, description="ADMM: steps, of 20, over which the mask thins out; 0 = Wanda's mask"
    )
    alpha: Rate = Field(
        100, description="GBLM: weight of the gradient norm beside the activation norm"
    )
    polish: Annotated[int, Field(ge=0, le=1000)] = Field(
        0,
        description="sweeps of exchanges within each group, after any method, while the error of "
        "the outputs falls; masks with updated weights stay as they are",
    )


ProtocolName = Literal[
    "heldout", "wikitext2-2048", "wikitext2-4096", "megatron", "megatron-2048", "c4"
]
PUBLISHED: dict[str, int] = {  # tokens of a window
    "wikitext2-2048": 2048,
    "wikitext2-4096": 4096,
    "megatron": 4096,
    "megatron-2048": 2048,
    "c4": 2048,
}


class EvaluateSection(Section):
    """Perplexity protocol: windows that do not overlap. Of a window of S tokens S - 1 are targets,
    and the tail is dropped, unless the protocol says otherwise.
    """

    protocol: ProtocolName = Field(
        "heldout",
        description="text and windows: heldout, the held-out documents of the domains; or as "
        "published tables have them, where window, max_tokens and bos of this section have no "
        "effect: wikitext2-2048 and wikitext2-4096, the test part of WikiText-2; megatron and "
        "megatron-2048, the same text in windows of 4,096 and 2,048 with every token a target; "
        "c4, 256 windows of 2,048 of C4's validation part",
    )
    text: UserPath | None = Field(
        None,
        description="file with the text of a published protocol: its rows as .jsonl, .parquet or "
        ".arrow with a column text, or all of it joined by two line feeds (WikiText-2, raw test "
        "part) or a space (C4, first validation file) as .txt; null = Salesforce/wikitext or "
        "allenai/c4 of the Hub, with the package datasets",
    )
    window: Annotated[int, Field(ge=2, le=2**20)] = Field(512, description="tokens of a window")
    max_tokens: int | None = Field(
        16384, ge=1, le=10**12, description="held-out tokens of each domain; null = all"
    )
    compare_tokens: int | None = Field(
        16384,
        ge=0,
        le=10**12,
        description="tokens of each domain at which every masked model is compared with the dense "
        "model: KL divergence and most likely token; 0 = none, null = all. A masked model's pass "
        "over them multiplies by the vocabulary matrix twice, and a rank keeps tokens x hidden "
        "size numbers",
    )
    micro_batch: Batch = free(4, description="windows of one forward pass")
    masks: dict[str, UserPath] = Field(
        default_factory=dict,
        description="row -> mask, named as learn.prior.mask, of any pattern; empty = the masks of "
        "prune.methods, the learned mask and recovered models, all of the settings' pattern",
    )
    bos: Literal["auto", "window", True, False] = Field(
        "auto",
        description="window: each window begins with a BOS; true: one BOS before the held-out "
        "stream; auto = window where documents begin with a BOS (data.bos), or else false",
    )

    @property
    def is_published(self) -> bool:
        """Whether the protocol has a text of its own, and needs no domains."""
        return self.protocol in PUBLISHED

    @property
    def protocol_window(self) -> int:
        """Tokens of a window under the protocol."""
        return PUBLISHED.get(self.protocol, self.window)


class Config(Section):
    """The whole tree. A recipe file and command-line overrides fill it, and every verb reads the
    sections that it needs. The named settings of ``learn.preset``, ``learn.memory`` and
    ``learn.method`` apply below the given values, from Python too.
    """

    run_dir: UserPath = free("runs/default", description="folder of all that the run makes")
    seed: Seed = Field(
        1234, description="seed of learning: samples, noise of the logits and of the masks"
    )
    device: Literal["auto", "cpu", "cuda"] = free(
        "auto", description="auto = the GPU where there is one"
    )
    deterministic: bool = free(
        False,
        description="use only algorithms that give the same bits each time; a CPU always does, "
        "on CUDA attention gets slower and larger",
    )
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="of weights and activations")
    pattern: str = Field(
        "2:4",
        description="keep N of every M consecutive inputs; N:M:pair keeps adjacent pairs, such as "
        "4:8:pair",
    )
    pattern_overrides: dict[str, str] = Field(
        default_factory=dict,
        description="shell-style pattern over Hugging Face module names -> N:M of these linears, "
        "in the place of pattern; no linear may match two entries",
    )
    model: ModelSection = ModelSection()
    parallel: ParallelSection = ParallelSection()
    data: DataSection = DataSection()
    calibration: CalibrationSection = CalibrationSection()
    prune: PruneSection = PruneSection()
    learn: LearnSection = LearnSection()
    evaluate: EvaluateSection = EvaluateSection()
    tasks: TasksSection = TasksSection()
    export: ExportSection = ExportSection()
    sensitivity: SensitivitySection = SensitivitySection()
    recover: RecoverSection = RecoverSection()
    speed: SpeedSection = SpeedSection()
    launch: LaunchSection = LaunchSection()

    @model_validator(mode="before")
    @classmethod
    def _apply_named_settings(cls, values: Any) -> Any:
        return layered(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check_what_a_kind_reads(self) -> Config:
        """A setting of a domain that its kind does not read would choose nothing, silently."""
        usual = CorpusSection(kind="hf")
        for name, corpus in self.data.domains.items():
            for key in ("split", "config"):
                value = getattr(corpus, key)
                if corpus.kind != "hf" and value != getattr(usual, key):
                    fix = "Leave it out, and name the files of that part alone in path."
                    allowed = f"for kind: hf alone, and here kind is {corpus.kind}"
                    raise ConfigError(f"data.domains.{name}.{key}", value, allowed, fix)
            if corpus.kind in ("stdlib", "pydocs") and corpus.path is not None:
                fix = "Leave it out, or choose the kind text or files."
                allowed = f"null: {corpus.kind} is the text of Python itself"
                raise ConfigError(f"data.domains.{name}.path", corpus.path, allowed, fix)
        return self

    @model_validator(mode="after")
    def _check_number_of_samples(self) -> Config:
        """Megatron's index of samples has some 16 bytes a sample, in the memory of every rank."""
        for name, section in (("learn", self.learn), ("recover", self.recover)):
            if section.steps * section.global_batch > MAX_SAMPLES:
                raise ConfigError(
                    f"{name}.steps",
                    section.steps,
                    f"at most {MAX_SAMPLES:,} samples in all: steps x {name}.global_batch "
                    f"({section.global_batch:,})",
                    "Lower one of the two.",
                )
        return self
