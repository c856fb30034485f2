"""The settings of the model, and of which of its linears stay dense."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megamask.config.section import Below1, Section, UserPath, by_content, free, one_error


class ModelSection(Section):
    """Which model, and which of its linears get a mask. Patterns are shell-style, over Hugging
    Face module names.
    """

    hf: UserPath | None = by_content(
        None,
        description="Hugging Face folder: config.json, weights (.safetensors or "
        "pytorch_model.bin), tokenizer; null = {run_dir}/hf",
    )
    gguf: UserPath | None = by_content(
        None, description="GGUF file that the verb gguf unpacks into model.hf"
    )
    megatron: UserPath | None = by_content(
        None,
        description="checkpoint of Megatron-LM or Megatron-Bridge (torch_dist) whose weights are "
        "read in the place of those in model.hf, which then needs the tokenizer only, and "
        "config.json where the checkpoint does not tell the whole architecture",
    )
    include: list[str] = Field(default_factory=lambda: ["*"], description="linears to prune")
    exclude: list[str] = Field(default_factory=list, description="linears to keep dense")
    exclude_sensitive: Annotated[Below1 | list[str], one_error("float_type")] = Field(
        0.0,
        description="what stays dense beside model.exclude: a share of the parts that the verb "
        "sensitivity measured, the most sensitive; or a list of linears, as the verb prints it, "
        "and as masks and config.yaml keep what a share came to",
    )
    sensitivity: UserPath | None = free(
        None,
        description="what the verb sensitivity wrote, for a share in model.exclude_sensitive; "
        "null = {run_dir}/sensitivity.json",
    )
    ignore_keys: list[str] = free(
        [],
        description="keys of config.json that megamask does not know and that change nothing",
    )
