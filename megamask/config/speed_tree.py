"""The settings of the measurement of 2:4 kernels."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megamask.config.section import Batch, Section, Tokens, UserPath


class SpeedSection(Section):
    """Times of dense and 2:4 products at inference, and the workload that they are chosen for: the
    answers to a batch of prompts, with a pass for each token of the answers.
    """

    folder: UserPath | None = Field(
        None,
        description="Hugging Face folder with 2:4 zeros, whose linears are measured and which "
        "generates text; null = {run_dir}/export",
    )
    dtype: Literal["bf16", "fp16"] = Field("bf16", description="of weights and activations")
    tokens: list[Tokens] = Field(
        [1, 4, 16, 64, 256, 1024, 4096, 16384],
        min_length=1,
        description="tokens of a forward pass to measure, beside those of the workload",
    )
    prompt: Tokens = Field(512, description="workload: tokens of a prompt")
    generate: Annotated[int, Field(ge=0, le=2**20)] = Field(
        128, description="workload: tokens of an answer; 0 = the pass over the prompts alone"
    )
    batch: Batch = Field(1, description="workload: prompts at once")
    rounds: Annotated[int, Field(ge=1, le=1000)] = Field(
        7, description="how often everything is timed; the median counts"
    )
