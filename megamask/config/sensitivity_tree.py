"""The settings of the sensitivity of layers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megamask.config.section import Below1, Section, UserPath


class SensitivitySection(Section):
    """What pruning a part of the model alone costs, and the parts that a budget keeps dense."""

    mask: UserPath = Field(
        "sparsegpt", description="mask whose parts are tried, named as learn.prior.mask"
    )
    by: Literal["layer", "linear"] = Field(
        "layer",
        description="layer: all linears of a decoder layer are pruned together; linear: each "
        "linear alone, those that Megatron fuses together",
    )
    rows: list[Annotated[int, Field(ge=0, le=10**6)]] = Field(
        default_factory=list,
        description="also measure the model with all masks but those of so many of the most "
        "sensitive parts, a row for each number; 0 = with all masks",
    )
    keep_dense: Below1 = Field(
        0.1, description="share of the parts, the most sensitive, that model.exclude is told for"
    )
