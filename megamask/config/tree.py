"""Every setting, its default and its range. Sections are frozen: nothing changes a setting after it
was read.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """Base of the sections: unknown keys are refused, values are checked (nothing is infinite),
    nothing can be reassigned.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which model, and which of its linears get a mask. Patterns are shell-style, over HF module
    names.
    """

    hf: str | None = Field(
        None, description="Hugging Face folder: config.json, *.safetensors, tokenizer"
    )
    gguf: str | None = Field(None, description="GGUF file that the verb gguf unpacks into model.hf")
    include: list[str] = Field(default_factory=lambda: ["*"], description="linears to prune")
    exclude: list[str] = Field(default_factory=list, description="linears to keep dense")


class ParallelSection(Section):
    """How the job is laid out; data parallel = world size / tp."""

    tp: Positive = 1
    sequence_parallel: bool = False
    recompute: Literal[False, True, "mlp"] = Field(
        False,
        description="make activations again in the backward pass: true, each layer's; mlp, its feed-forward part's",
    )
    timeout_minutes: Positive = 30
    threads: int | None = Field(
        None, gt=0, description="CPU threads a rank; None divides the cores among local ranks"
    )


class CorpusSection(Section):
    """One text domain. ``kind`` says where the documents come from."""

    kind: Literal["stdlib", "pydocs", "text", "jsonl", "parquet", "hf"]
    path: str | None = Field(
        None, description="file, folder or glob (text, jsonl, parquet) or dataset name (hf)"
    )
    config: str | None = Field(None, description="dataset configuration (hf)")
    split: str = Field("train", description="dataset split (hf)")
    field: str = Field("text", description="column that holds the text (jsonl, parquet, hf)")
    max_bytes: int | None = Field(None, gt=0, description="stop after this much text")
    heldout: Share = Field(0.05, description="share of documents kept for evaluation")


class DataSection(Section):
    """Text domains, how they are tokenized and how they are blended for learning."""

    tokenizer: str | None = Field(
        None, description="HF tokenizer folder or sentencepiece .model; None = model.hf"
    )
    domains: dict[str, CorpusSection] = Field(default_factory=dict)
    blend: dict[str, float] = Field(
        default_factory=dict, description="domain -> weight; empty = equal weights"
    )
    seq_length: Positive = 256
    append_eod: bool = True
    eod_token: str | None = Field(
        None, description="token that ends a document; None = the tokenizer's EOS"
    )


class CalibrationSection(Section):
    """Samples for the one-shot criteria, drawn from the training blend with ``seed``."""

    samples: Positive = 32
    seq_length: Positive = 512
    micro_batch: Positive = 4
    seed: int = 0


OneShotMethod = Literal["magnitude", "wanda", "sparsegpt", "sparsegpt_update"]


class PruneSection(Section):
    """One-shot masks. ``sparsegpt_update`` also writes updated weights, as a comparison."""

    methods: list[OneShotMethod] = ["magnitude", "wanda", "sparsegpt", "sparsegpt_update"]
    damp: Annotated[float, Field(gt=0)] = Field(
        0.01, description="SparseGPT: share of the mean diagonal added to the Hessian"
    )
    block: Positive = Field(
        128, description="SparseGPT: columns per lazy update block, a multiple of M"
    )


class SamplingSection(Section):
    """The relaxed draws of masks (MaskLLM, Eq. 6-7, or the linear counterpart). Pairs are first and
    last value, linear in progress.
    """

    mode: Literal["soft", "hard"] = "soft"
    draws: Literal["micro_batch", "step"] = Field(
        "micro_batch", description="a fresh mask per micro-batch, or one mask for the whole step"
    )
    kappa: tuple[NonNegative, NonNegative] = Field(
        (100.0, 500.0), description="scale of the logits"
    )
    tau: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = Field(
        (1.0, 0.05), description="temperature"
    )
    logit_std: Annotated[float, Field(gt=0)] = Field(
        0.01, description="std of the initial logits, and the prior's unit"
    )
    initial_noise: bool = Field(
        False,
        description="start from N(0, logit_std) logits and the prior, not from the prior alone",
    )
    backend: Literal["auto", "torch", "numba", "triton"] = "auto"


class PriorSection(Section):
    """The mask that initialises the logits (MaskLLM, Eq. 9-10)."""

    mask: str | None = Field(
        "sparsegpt",
        description="name of a mask of this run, mask file, snapshot, folder of snapshots, or null",
    )
    strength: NonNegative = Field(3.0, description="alpha")


class StateSection(Section):
    """What a learner keeps between passes. The footprints ``lean`` and ``leanest`` choose it,
    ``leanest`` the optimizer too.
    """

    logits: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16 is updated with stochastic rounding: plain bf16 loses small steps"
    )
    grads: Literal["fp32", "bf16"] = Field(
        "fp32", description="the buffer in which micro-batches add up their gradients"
    )
    masked_weight: Literal["keep", "regenerate"] = Field(
        "keep", description="for the backward pass: kept from the forward, or drawn again"
    )
    movement: bool = Field(
        True, description="keep winners to report flips and the difference to the prior"
    )


class OptimizerSection(Section):
    """The optimizer of the mask logits. The moments of ``adamw`` have the dtype of the logits."""

    kind: Literal["adamw", "adamw8bit", "lion", "lion8bit"] = "adamw"
    lr: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="logits a step; None: half the prior's strength x logit_std over the root of learn.steps, for Lion a third of it",
    )
    min_lr: NonNegative | None = Field(None, description="the rate at the end; None: a tenth of lr")
    warmup_steps: int | None = Field(
        None, ge=0, description="steps in which the rate rises; None: a tenth of learn.steps"
    )
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: NonNegative = 0.1
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.95,
    )
    eps: Annotated[float, Field(gt=0)] = 1e-8
    eps_rms: NonNegative = Field(
        0.1,
        description="AdamW: added to eps, in units of a clipped gradient's root mean square; small gradients then move logits less",
    )
    clip: NonNegative = Field(1.0, description="largest gradient norm; 0 switches clipping off")
    distributed: bool = Field(
        False,
        description="each replica updates some layers and keeps optimizer state for those alone (ZeRO-1)",
    )


class WeightNormSection(Section):
    """The term - coef * sum |W * M|^2 (MaskLLM, Eq. 8)."""

    coef: NonNegative = 1e-5
    decay: Literal["none", "linear"] = Field(
        "linear", description="linear: falls to 0 with progress"
    )


class LossSection(Section):
    """What the masked model learns from: the text (lm), the distribution of the dense model (kd:
    distillation), or both (mix).
    """

    kind: Literal["lm", "kd", "mix"] = "lm"
    share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="weight of kd in mix; the text has the rest"
    )
    temperature: Annotated[float, Field(gt=0, le=100)] = Field(
        1.0, description="of kd: divides the logits of both models"
    )
    top_k: int | None = Field(
        None,
        gt=0,
        description="of kd: tell apart the k tokens likeliest under the dense model, and count the rest as one; None = all",
    )


class SnapshotSection(Section):
    """Resumable state."""

    every: Positive = 50
    keep: Positive = 2


class MonitorSection(Section):
    """Where metrics go and how often the winner mask is evaluated."""

    evaluate_every: Annotated[int, Field(ge=0)] = Field(
        50, description="steps; 0 = only at the end"
    )
    evaluate_windows: Positive = Field(8, description="held-out windows per domain while learning")
    patience: Annotated[int, Field(ge=0)] = Field(
        0, description="stop after this many evaluations without a better one; 0 = never"
    )
    tensorboard: bool = True
    wandb: Literal["off", "offline", "online"] = "offline"
    wandb_project: str = "megamask"


class MaskProSection(Section):
    """The policy-gradient learner (``learn.learner: maskpro``): draws masks, tries them in forward
    passes, makes likelier what did well.
    """

    lr: Annotated[float, Field(gt=0)] = Field(50.0, description="logits per nat of loss")
    initial_logit: Annotated[float, Field(gt=0)] = Field(
        10.0, description="of the weights that the prior keeps; the others start at 0"
    )
    masks: Positive = Field(1, description="masks drawn per step")
    data: Literal["split", "shared"] = Field(
        "split",
        description="the masks of a step divide its micro-batches, or each sees all of them",
    )
    baseline: Literal["tracker", "leave_one_out", "winner"] = Field(
        "tracker",
        description="what a mask is compared with: past residuals, the step's other masks, or the winner mask on the same data",
    )
    tracker_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    score: Literal["auto", "set", "ordered"] = Field(
        "auto", description="of the mask, or of the order of its draws; auto: set if N <= 4"
    )
    samples: int | None = Field(
        512,
        gt=0,
        description="how many samples are learned from, again and again; None = new ones all the time",
    )


class LearnSection(Section):
    """A learning run: the step, its schedule and its bookkeeping."""

    preset: Literal["best", "maskllm", "maskpro"] = Field(
        "best", description="named defaults, applied below the other settings"
    )
    learner: Literal["gumbel", "maskpro"] = Field(
        "gumbel", description="gradients through relaxed masks, or of rewards of drawn masks"
    )
    footprint: Literal["default", "lean", "leanest"] = Field(
        "default", description="named choices of state and optimizer, likewise"
    )
    distribution: Literal["categorical", "linear"] = Field(
        "linear",
        description="one logit per weight (any N:M with M <= 32), or one per candidate mask of a group",
    )
    steps: Positive = 2000
    micro_batch: Positive = 4
    global_batch: Positive = 4
    sampling: SamplingSection = SamplingSection()
    prior: PriorSection = PriorSection()
    state: StateSection = StateSection()
    optimizer: OptimizerSection = OptimizerSection()
    maskpro: MaskProSection = MaskProSection()
    loss: LossSection = LossSection()
    weight_norm: WeightNormSection = WeightNormSection()
    snapshot: SnapshotSection = SnapshotSection()
    monitor: MonitorSection = MonitorSection()
    resume: bool = True


class EvaluateSection(Section):
    """Perplexity protocol: non-overlapping windows, window-1 targets each, tail dropped."""

    window: Annotated[int, Field(gt=1)] = 512
    max_tokens: int | None = Field(
        16384, gt=0, description="held-out tokens per domain; None = all"
    )
    micro_batch: Positive = 4
    masks: dict[str, str] = Field(
        default_factory=dict,
        description="row -> mask, named as learn.prior.mask; empty = all of this run",
    )
    bos: bool = Field(False, description="put one BOS before the held-out stream")


class ExportSection(Section):
    """A plain Hugging Face folder with the mask applied."""

    mask: str | None = Field(
        None,
        description="mask, named as learn.prior.mask; None = the learned one; 'dense' exports without a mask",
    )
    weights: str | None = Field(
        None, description="Megatron weights to write; None = those of model.hf"
    )
    out: str | None = Field(None, description="folder; None = {run_dir}/export")


class PlanSection(Section):
    """What the verb plan is asked. Its flags stand for these settings and a few others: --model,
    --dp, --gpu, --json.
    """

    model: str | None = Field(
        None,
        description="a shape such as llama2-7b, a Hugging Face folder or config.json; None = the run's model",
    )
    dp: Positive = Field(1, description="replicas: number of devices / parallel.tp")
    gpu: Literal["a100-40", "a100", "h100", "h200", "cpu"] | None = Field(
        None, description="device that must hold it; None = any GPU"
    )
    out: str | None = Field(None, description="JSON file for the figures")


class DiffSection(Section):
    """What the verb diff compares: ``megamask diff A B --json FILE --picture FILE`` stands for
    these settings.
    """

    a: str | None = Field(None, description="mask, named as learn.prior.mask")
    b: str | None = Field(None, description="likewise")
    out: str | None = Field(None, description="JSON file for the figures")
    picture: str | None = Field(
        None, description="PNG file: groups that differ, linear kinds x layers"
    )


class ExtractSection(Section):
    """What the verb extract writes: ``megamask extract SNAPSHOT FILE`` stands for these
    settings.
    """

    mask: str | None = Field(None, description="mask, named as learn.prior.mask")
    out: str | None = Field(None, description="mask file to write")


class Config(Section):
    """The whole tree: a recipe file and command-line overrides fill it, every verb reads the
    sections it needs.
    """

    run_dir: str = "runs/default"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1234
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["bf16", "fp32"] = "bf16"
    pattern: str = Field("2:4", description="keep N of every M consecutive inputs")
    model: ModelSection = ModelSection()
    parallel: ParallelSection = ParallelSection()
    data: DataSection = DataSection()
    calibration: CalibrationSection = CalibrationSection()
    prune: PruneSection = PruneSection()
    learn: LearnSection = LearnSection()
    evaluate: EvaluateSection = EvaluateSection()
    export: ExportSection = ExportSection()
    plan: PlanSection = PlanSection()
    diff: DiffSection = DiffSection()
    extract: ExtractSection = ExtractSection()
