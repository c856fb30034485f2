"""The settings of tasks of lm-evaluation-harness."""

from __future__ import annotations

from pydantic import Field

from megamask.config.section import Section, UserPath


class TasksSection(Section):
    """Tasks of lm-evaluation-harness, with the masks and the batch of ``evaluate``."""

    names: list[str] = Field(
        [*("hellaswag", "race", "piqa", "winogrande", "arc_easy", "arc_challenge", "openbookqa")],
        min_length=1,
        description="tasks, groups or tags; the default is MaskLLM's seven",
    )
    include: UserPath | None = Field(
        None, description="folder with task files (*.yaml) beside those of the harness"
    )
    limit: int | None = Field(
        None, ge=1, le=10**9, description="the first documents of each task; null = all"
    )
    shots: int | None = Field(
        None,
        ge=0,
        le=1000,
        description="examples in each prompt; null = what the task says, or none",
    )
    folder: UserPath | None = Field(
        None,
        description="Hugging Face folder, such as an exported one: it and model.hf run in "
        "transformers, in the place of the converted model and its masks",
    )
