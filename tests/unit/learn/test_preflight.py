"""What is refused before a model is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megamask.config.learn_tree import SamplingSection
from megamask.config.load import load_config
from megamask.config.paths import run_paths
from megamask.errors import ArtifactError, ConfigError
from megamask.learn.gradient_method import check_schedules
from megamask.learn.preflight import require_places, unused_settings


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("tau", (1.0, 2.0), "a temperature that falls"),
        ("kappa", (2.0, 1.0), "a scale that grows or stays"),
        ("kappa", (0.0, 0.0), "must end above 0"),
    ],
)
def test_a_schedule_that_ends_below_its_range(
    setting: str, value: tuple[float, float], said: str
) -> None:
    with pytest.raises(ConfigError, match=rf"learn\.sampling\.{setting} = .*{said}"):
        check_schedules(SamplingSection.model_validate({setting: value}))


def test_equal_factors_cannot_begin_at_zero() -> None:
    section = SamplingSection(schedule="exponential", kappa=(0.0, 1.0))
    with pytest.raises(ConfigError, match=r"learn\.sampling\.kappa = .*must begin above 0"):
        check_schedules(section)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"tau": (1.0, 1.0)},
        {"kappa": (5.0, 5.0)},
        {"kappa": (0.0, 1.0)},
        {"kappa": (1.0, 500.0), "schedule": "exponential"},
    ],
)
def test_a_schedule_that_stays_or_hardens(values: dict[str, Any]) -> None:
    check_schedules(SamplingSection.model_validate(values))


@pytest.mark.parametrize(
    ("given", "unused"),
    [
        ([], []),
        (
            ["learn.distillation.temperature=2", "learn.distillation.top_k=5"],
            ["learn.distillation.temperature", "learn.distillation.top_k"],
        ),
        (["learn.distillation.share=1", "learn.distillation.temperature=2"], []),
        (["learn.distillation.share=0.1", "learn.optimizer.lr=1"], []),
        (["learn.maskpro.lr=3"], ["learn.maskpro.lr"]),
        (["learn.method=maskpro", "learn.maskpro.lr=3"], []),
        (
            [
                "learn.preset=maskpro",
                "learn.distillation.share=0",
                "learn.optimizer.lr=1",
                "learn.weight_norm=[0, 0]",
            ],
            ["learn.optimizer.lr", "learn.weight_norm"],
        ),
        # Lion has no root of a second moment to add it to
        (["learn.preset=maskllm", "learn.memory=leanest"], ["learn.optimizer.epsilon"]),
        (["learn.optimizer.kind=lion", "learn.optimizer.betas=[0.9, 0.99]"], []),
        # micro-batches that share a mask share its masked weights
        (["learn.memory=lean", "learn.sampling.draws=step"], ["learn.state.masked_weight"]),
        (["learn.memory=lean"], []),
        (["learn.prior.mask=null", "learn.prior.strength=5"], ["learn.prior.strength"]),
        (["learn.method=maskpro", "learn.prior.strength=5"], ["learn.prior.strength"]),
        (
            ["learn.optimizer.schedule=constant", "learn.optimizer.min_lr=1"],
            ["learn.optimizer.min_lr"],
        ),
        (
            ["learn.preset=maskpro", "learn.sampling.kappa=[1, 2]", "learn.state.grads=fp32"],
            ["learn.sampling.kappa", "learn.state.grads"],
        ),
        (["learn.method=maskpro", "learn.sampling.mode=soft"], ["learn.sampling.mode"]),
        (["learn.preset=maskpro"], []),
    ],
)
def test_settings_that_change_nothing_are_named(given: list[str], unused: list[str]) -> None:
    assert unused_settings(load_config(None, given).learn) == unused


@pytest.mark.parametrize("name", [".", "masks", "learn", "learn/snapshots"])
def test_a_place_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    """Found before the model is loaded. A link that leads below a file stands for a read-only
    folder, which would not stop root.
    """
    paths = run_paths(load_config(None, [f"run_dir={tmp_path / 'run'}"]))
    require_places(paths)
    assert [path.name for path in paths.run_dir.iterdir()] == []  # makes none of them
    (tmp_path / "file").write_text("")
    place = paths.run_dir / name
    if name == ".":
        place.rmdir()
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(tmp_path / "file" / "below")
    with pytest.raises(ArtifactError, match=rf"^{place}: cannot be written"):
        require_places(paths)
    place.unlink()
    require_places(paths)
