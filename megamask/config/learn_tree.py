"""The settings of a learning run: sections of ``learn``, their defaults and their ranges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from megamask.config.presets import NAMED
from megamask.config.section import (
    Batch,
    Below1,
    Coefficient,
    Positive,
    Rate,
    Samples,
    Section,
    Share,
    Steps,
    UserPath,
    by_content,
    each_step,
    free,
    one_error,
)  # fmt: skip
from megamask.errors import ConfigError

WHOLE_STEP = 2**62  # micro-batches; more than a step has


class SamplingSection(Section):
    """The relaxed samples of masks (MaskLLM, Eq. 6-7, or their k-subset counterpart). A pair is a
    first and a last value.
    """

    mode: Literal["soft", "hard"] = each_step(
        "soft", description="relaxed masks, or hard masks with the gradient of the relaxed masks"
    )
    draws: Annotated[Literal["micro_batch", "step"] | Batch, one_error("int_type")] = each_step(
        "micro_batch",
        description="a new mask for every micro-batch, one for the whole step, or one for so many "
        "consecutive micro-batches of the global batch, counted over all replicas",
    )
    kappa: tuple[Coefficient, Coefficient] = each_step(
        (100.0, 500.0), description="scale of the logits: first and last"
    )
    tau: tuple[Positive, Positive] = each_step(
        (1.0, 0.05), description="temperature: first and last"
    )
    schedule: Literal["linear", "exponential"] = each_step(
        "linear",
        description="how kappa and tau go from first to last: by equal differences, or by equal "
        "factors",
    )
    annealed_by: Annotated[float, Field(ge=0.01, le=1)] = each_step(
        1.0,
        description="share of learn.steps after which kappa and tau are at their last values, "
        "which then stay",
    )
    noise: float = each_step(
        0.0,
        ge=0,
        le=100,
        description="factor on the Gumbel noise of every draw: 1 as MaskLLM (and by default with "
        "categorical and maskpro), 0 the masks of the logits alone, which need no random numbers",
    )
    logit_std: Positive = Field(
        0.01, description="standard deviation of the initial logits, and the prior's unit"
    )
    initial_noise: bool = Field(
        False,
        description="start from N(0, logit_std) logits and the prior, not from the prior alone",
    )
    backend: Literal["auto", "torch", "numba", "triton"] = free(
        "auto", description="code that draws masks; auto = the fastest one for the device"
    )

    @property
    def span(self) -> int:
        """How many consecutive micro-batches of the global batch share a mask."""
        names = {"micro_batch": 1, "step": WHOLE_STEP}
        return names[self.draws] if isinstance(self.draws, str) else self.draws

    def uses(self, accumulations: int, replicas: int = 1, replica: int = 0) -> list[int]:
        """How many micro-batches of a replica each of its masks of a step serves, in their order.

        Args:
            accumulations: micro-batches that the replica runs in a step. Number ``a`` of them is
                micro-batch ``a * replicas + replica`` of the global batch.
            replicas: of the run.
            replica: counted from 0.
        """
        numbers = range(replica, accumulations * replicas, replicas)
        return list(Counter(number // self.span for number in numbers).values())


class PriorSection(Section):
    """The mask that initialises the logits (MaskLLM, Eq. 9-10)."""

    mask: UserPath | None = by_content(
        "sparsegpt",
        description="name of a mask of this run, mask file, snapshot, folder of snapshots, or null",
    )
    strength: Coefficient = Field(3.0, description="alpha: the prior's gap in units of logit_std")
    margins: bool = Field(
        True,
        description="start each weight at its margin, how clearly the prior's criterion chose, and "
        "not all at one gap; a mask file needs its .margins beside it",
    )


class StateSection(Section):
    """What learning keeps between passes. ``learn.memory`` chooses it by name."""

    logits: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16 is updated with stochastic rounding: plain bf16 loses small steps"
    )
    grads: Literal["fp32", "bf16"] = each_step(
        "fp32", description="of the buffer in which micro-batches add up their gradients"
    )
    masked_weight: Literal["keep", "regenerate"] = free(
        "keep", description="for the backward pass: kept from the forward pass, or drawn again"
    )
    track_flips: bool = free(
        True, description="keep hard masks, to report flips and the difference to the prior"
    )


class OptimizerSection(Section):
    """The optimizer of the mask logits. The moments of ``adamw`` have the dtype of the logits."""

    kind: str = Field(
        "adamw",
        description="adamw, adamw8bit (needs torchao and a compiler), lion or lion8bit",
    )
    lr: Rate | None = each_step(
        None,
        description="logits per step; null = half the prior's gap (strength x logit_std) over the "
        "root of learn.steps, with margins at most a sixtieth of the gap, or less for batches "
        "below 2,048 tokens (512 with distillation.hidden from 0.25 on); a third for Lion",
    )
    min_lr: Coefficient | None = each_step(
        None, description="the rate at the end; null = a tenth of lr"
    )
    warmup_steps: int | None = each_step(
        None,
        ge=0,
        le=10**7,
        description="steps in which the rate rises; null = a tenth of learn.steps",
    )
    schedule: Literal["cosine", "linear", "constant"] = each_step(
        "cosine", description="how the rate falls from lr to min_lr"
    )
    weight_decay: Coefficient = each_step(0.1, description="decay of the logits, times the rate")
    betas: tuple[Below1, Below1] | None = each_step(
        None,
        description="decay rates of both moments; null = 0.95 for the second (Lion: 0.99), and for "
        "the first 0.9, or less for AdamW in a run below 60 steps, whose mean gradient spans a "
        "sixth of the steps, and two at least",
    )
    epsilon: tuple[Annotated[float, Field(ge=1e-30, le=1e6)], Coefficient] = each_step(
        (1e-8, 0.1),
        description="AdamW: absolute part, and part in units of a clipped gradient's root mean "
        "square (0 with clip=0); small gradients then move logits less",
    )
    clip: Coefficient = each_step(1.0, description="largest gradient norm; 0 switches clipping off")
    distributed: bool = free(
        False,
        description="each replica updates some layers, and keeps optimizer state for those layers "
        "alone (ZeRO-1)",
    )

    @property
    def decays(self) -> tuple[float, float]:
        """The decay rates of both moments, in the section that an optimizer is built from."""
        assert self.betas is not None, "megamask.optim.optimizers.build_optimizer derives them"
        return self.betas


class MaskProSection(Section):
    """The policy-gradient method (``learn.method: maskpro``): draws masks, tries them in forward
    passes, and makes masks with a low loss likelier.
    """

    lr: Rate = each_step(50.0, description="logits per nat of loss")
    initial_logit: Positive = Field(
        10.0, description="of the weights that the prior keeps; the other logits start at 0"
    )
    masks: Batch = each_step(1, description="masks drawn per step")
    data: Literal["split", "shared"] = each_step(
        "split",
        description="the masks of a step divide its micro-batches, or each sees all of them",
    )
    baseline: Literal["tracker", "leave_one_out", "hard_mask"] = each_step(
        "tracker",
        description="what a mask is compared with: past residuals, the step's other masks, or the "
        "hard mask on the same data",
    )
    tracker_decay: Below1 = each_step(0.99, description="of the moving average of past residuals")
    score: Literal["auto", "set", "ordered"] = each_step(
        "auto", description="of the mask, or of the order of its draws; auto: set if N <= 4"
    )
    samples: int | None = Field(
        512,
        ge=1,
        le=10**7,
        description="how many samples are learned from, again and again; null = always new ones",
    )


class DistillationSection(Section):
    """How much the masked model learns from the dense model, its logits and its layers."""

    share: Share = each_step(
        0.0, description="weight of the dense model in the loss: 0 = text alone, 1 = no text"
    )
    temperature: Annotated[float, Field(ge=1e-3, le=100)] = each_step(
        1.0, description="divides the logits of both models"
    )
    top_k: int | None = each_step(
        None,
        ge=1,
        le=2**31 - 1,
        description="tell apart the k tokens that are likeliest under the dense model, and count "
        "the rest as one token; null = all tokens",
    )
    hidden: Annotated[float, Field(ge=0, le=1e6)] = each_step(
        0.0,
        description="weight of the layers' distance from those of the dense model, summed over the "
        "layers and relative to each token's state, on top of the loss",
    )

    @property
    def needs_dense_model(self) -> bool:
        """Whether a step runs the dense model too."""
        return self.share > 0 or self.hidden > 0


class SnapshotSection(Section):
    """Resumable state."""

    every: Steps = free(50, description="steps between snapshots")
    keep: Samples = free(2, description="snapshots that stay on disk")
    background: bool = free(
        True, description="write periodic snapshots beside the next steps, from a copy on the host"
    )


class MonitorSection(Section):
    """Where metrics go and how often the hard mask is evaluated."""

    evaluate_every: Annotated[int, Field(ge=0, le=10**7)] = free(
        50, description="steps between evaluations; 0 = only at the start and at the end"
    )
    evaluate_windows: Samples = free(
        8, description="held-out windows of each domain while learning"
    )
    measure_every: Annotated[int, Field(ge=0, le=10**7)] = free(
        10,
        description="steps between measurements of AdamW's update: share of signal in the "
        "gradient, of logits below epsilon, length of a move; 0 = none",
    )
    sinks: list[Literal["tensorboard", "wandb", "wandb_offline"]] = free(
        ["tensorboard", "wandb_offline"],
        description="where metrics go beside metrics.jsonl; wandb uploads them at once",
    )
    wandb_project: str = free("megamask", description="project of wandb runs")


class LearnSection(Section):
    """A learning run: the step, its schedule and its bookkeeping."""

    preset: Literal["best", "minutes", "maskllm", "maskpro", "roi"] = free(
        "best", description="named settings, applied below the given settings"
    )
    method: str = Field(
        "subset",
        description="subset: a logit per weight, for any N:M with M <= 32, through relaxed "
        "samples; categorical: a logit per candidate mask of a group, through relaxed samples; "
        "maskpro: a logit per weight, from the losses of drawn masks",
    )
    memory: Literal["default", "lean", "leanest"] = free(
        "default", description="named choices of learn.state and learn.optimizer, likewise"
    )
    steps: Steps = each_step(2000, description="steps of the whole run")
    micro_batch: Batch = free(4, description="samples of one pass on one replica")
    global_batch: Batch = Field(4, description="samples of a step, over all replicas")
    resume: bool = free(
        True, description="go on from the newest snapshot; false puts old snapshots and masks aside"
    )
    sampling: SamplingSection = SamplingSection()
    prior: PriorSection = PriorSection()
    state: StateSection = StateSection()
    optimizer: OptimizerSection = OptimizerSection()
    maskpro: MaskProSection = MaskProSection()
    distillation: DistillationSection = DistillationSection()
    weight_norm: tuple[Coefficient, Coefficient] = each_step(
        (1e-5, 0.0),
        description="coefficient of the term - c * sum |W * M|^2 (MaskLLM, Eq. 8): first and last",
    )
    snapshot: SnapshotSection = SnapshotSection()
    monitor: MonitorSection = MonitorSection()

    def model_copy(
        self: LearnSection, *, update: Mapping[str, Any] | None = None, deep: bool = False
    ) -> LearnSection:
        """As ``Section.model_copy``. A named setting applies when the copy becomes a part of a
        ``Config``.

        Raises:
            ConfigError: a named setting in the place of another, whose settings would stay.
        """
        for name, known in NAMED.items():
            former, now = getattr(self, name), (update or {}).get(name, getattr(self, name))
            if former != now and known.get(former):
                raise ConfigError(
                    f"learn.{name}",
                    now,
                    f"not in a copy of settings that {former} made: those would stay",
                    f'Write build_config({{"learn": {{"{name}": ...}}}}).',
                )
        return super().model_copy(update=update, deep=deep)
