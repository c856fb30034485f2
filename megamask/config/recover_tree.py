"""The settings of a recovery: other values of the kept weights, under a mask that stays."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megamask.config.section import Rate, Section, free

RecoveryName = Literal["reconstruct"]


class RecoverSection(Section):
    """Recovery of the kept weights under a fixed mask. The result has weights of its own and is
    labelled "recovered": it is no result of the frozen weights.
    """

    method: RecoveryName = Field(
        "reconstruct",
        description="reconstruct: least squares of each linear on the calibration samples, layer "
        "by layer",
    )
    mask: str = Field("learned", description="mask that stays, named as learn.prior.mask")
    out: str | None = free(
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
