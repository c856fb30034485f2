"""The settings of the sensitivity of layers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megamask.config.section import Below1, Section


class SensitivitySection(Section):
    """What pruning a part of the model alone costs, and the parts that a budget keeps dense."""

    mask: str = Field(
        "sparsegpt", description="mask whose parts are tried, named as learn.prior.mask"
    )
    by: Literal["layer", "linear"] = Field(
        "layer",
        description="layer: all linears of a decoder layer are pruned together; linear: each "
        "linear alone, those that Megatron fuses together",
    )
    keep_dense: Below1 = Field(
        0.1, description="share of the parts, the most sensitive, that model.exclude is told for"
    )
