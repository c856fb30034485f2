"""The settings of a recovery: other values of the kept weights, under a mask that stays."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megamask.config.section import Batch, Positive, Rate, Section, Share, Steps, UserPath, free

RecoveryName = Literal["reconstruct", "blockwise", "finetune", "lora"]


class RecoverSection(Section):
    """Recovery of the kept weights under a fixed mask. The result has weights of its own and is
    labelled "recovered": it is no result of the frozen weights.
    """

    method: RecoveryName = Field(
        "lora",
        description="reconstruct: least squares of each linear on the calibration samples, layer "
        "by layer; blockwise: the kept weights of each decoder layer, trained to give the outputs "
        "of the dense layer; finetune: all kept weights, trained on the text; lora: a low-rank "
        "change of them, trained and merged under the mask",
    )
    mask: UserPath = Field("learned", description="mask that stays, named as learn.prior.mask")
    out: UserPath | None = free(
        None, description="folder to write; null = {run_dir}/recovered/MASK-METHOD"
    )
    solver: Literal["exact", "sequential"] = Field(
        "exact",
        description="reconstruct: exact solves the least squares of each row; sequential spreads "
        "the error of each removed weight over the columns to its right, as SparseGPT, which is "
        "faster and leaves a larger error",
    )
    damp: Rate = Field(
        0.01, description="reconstruct: share of the mean diagonal added to the Hessian"
    )
    steps: Steps = Field(
        60, description="blockwise: steps of Adam for each layer; finetune, lora: steps"
    )
    global_batch: Batch = Field(16, description="finetune, lora: samples of a step")
    micro_batch: Batch = free(4, description="finetune, lora: samples of one pass of a replica")
    rate: Rate | None = Field(
        None,
        description="blockwise, finetune, lora: highest rate, reached after a tenth of the steps "
        "and falling to a tenth of it; null = 1e-4, for lora 1e-3",
    )
    distillation: Share = Field(
        0.0,
        description="finetune, lora: weight of the dense model in the loss, as "
        "learn.distillation.share",
    )
    rank: Annotated[int, Field(ge=1, le=4096)] = Field(
        16, description="lora: rank of the change of a linear, those that Megatron fuses together"
    )
    alpha: Positive = Field(32.0, description="lora: the change is alpha / rank times B A")
    snapshot_every: Steps = free(
        50, description="finetune, lora: steps between snapshots, from which a killed run goes on"
    )
