"""The settings of an export."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megamask.config.section import Section, UserPath


class ExportSection(Section):
    """The model with the mask applied, as a plain Hugging Face folder or a Megatron checkpoint; or
    the mask alone, as the file of another tool.
    """

    format: Literal["hf", "megatron", "maskllm", "patch"] = Field(
        "hf",
        description="hf: a folder that transformers loads; megatron: a checkpoint (torch_dist) "
        "that Megatron-LM loads at any tensor parallel size; maskllm, patch: the mask alone, as "
        "mask_compressed.npz of MaskLLM or mask.npz of PATCH",
    )
    mask: UserPath | None = Field(
        None,
        description="mask, named as learn.prior.mask; null = the learned mask; "
        "dense exports without a mask",
    )
    weights: UserPath | None = Field(
        None, description="Megatron weights to write; null = those of the base model"
    )
    out: UserPath | None = Field(
        None,
        description="folder to write; null = {run_dir}/export, "
        "or export-FORMAT for the other formats",
    )
