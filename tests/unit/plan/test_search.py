"""The search for layouts, against a loop over the planner that is written here."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megamask.config import load_config
from megamask.errors import ConfigError
from megamask.plan.hardware import GIB, GPUS
from megamask.plan.memory import memory_of
from megamask.plan.search import Candidate, search, search_json, search_lines
from megamask.plan.time import time_of
from megamask.plan.workload import Workload
from megamask.weights.shapes import read_shape

PAPER = ("learn.preset=maskllm", "learn.micro_batch=1", "data.seq_length=4096")
H100 = GPUS["h100"]
Row = tuple[bool, float, float, int, str]  # as ``brute_force``


def run(*settings: str, model: str = "llama2-7b") -> Workload:
    return Workload(load_config(None, [*PAPER, *settings]), read_shape(model))


def brute_force(gpus: int, *settings: str, model: str = "llama2-7b") -> list[Row]:
    """(other masks, GPU-hours, bytes, tp, memory) of the best of each layout and memory state.

    Each run is read from words, as a user writes them, not changed from another.
    """
    rows: dict[tuple[int, str], tuple[bool, float, float]] = {}
    for tp in (one for one in range(1, 9) if gpus % one == 0):
        for memory in ("default", "lean", "leanest"):
            for recompute in ("false", "mlp", "true"):
                for micro in (1, 2, 4):
                    for parallel in ("false", "true"):
                        for distributed in ("false", "true"):
                            words = [
                                f"parallel.tp={tp}",
                                f"learn.memory={memory}",
                                f"parallel.recompute={recompute}",
                                f"learn.micro_batch={micro}",
                                f"parallel.sequence_parallel={parallel}",
                                f"learn.optimizer.distributed={distributed}",
                            ]
                            work = replace(run(*settings, *words, model=model), dp=gpus // tp)
                            try:
                                work.check()
                            except ConfigError:
                                continue
                            size = memory_of(work, H100).total
                            if size > H100.capacity:
                                continue
                            hours = time_of(work, H100).gpu_hours(work.config.learn.steps)
                            row = (memory != "default" or micro != 1, hours, size)
                            key = tp, memory
                            rows[key] = min(rows.get(key, row), row)
    return sorted((*row, *key) for key, row in rows.items())[:10]


def seen(one: Candidate) -> Row:
    memory = one.work.config.learn.memory
    return bool(one.changed), one.gpu_hours, one.total, one.work.tp, memory


@pytest.mark.parametrize(
    ("gpus", "model", "settings"),
    [(4, "llama2-7b", ("learn.sampling.draws=step",)), (6, "smollm2-135m", ("learn.steps=50",))],
)
def test_a_search_equals_a_loop_over_the_planner(
    gpus: int, model: str, settings: tuple[str, ...]
) -> None:
    settings = (*settings, "data.seq_length=2048", "learn.global_batch=192")
    found = search(run(*settings, model=model), H100, gpus)
    wanted = brute_force(gpus, *settings, model=model)
    assert [seen(one) for one in found.best] == wanted
    assert len({row[0] for row in wanted}) == 2 and len({row[3] for row in wanted}) > 1


def test_the_printed_overrides_make_the_row() -> None:
    """Those of the table give the same figures when they are pasted behind the settings."""
    found = search(run("parallel.tp=8", "parallel.sequence_parallel=true"), H100, 8)
    assert [bool(one.changed) for one in found.best] == sorted(
        bool(one.changed) for one in found.best
    )
    text = "\n".join(search_lines(found, H100, 8))
    for one, row in zip(found.best, search_json(found, H100, 8)["best"], strict=True):
        words = f"parallel.tp=8 parallel.sequence_parallel=true {one.overrides}".split()
        pasted = replace(run(*words), dp=row["dp"]).check()
        assert one.overrides in text and row["overrides"] == one.overrides
        assert memory_of(pasted, H100).total == row["total_bytes"] <= H100.capacity
        assert time_of(pasted, H100).seconds == row["step_seconds"]
        assert row["changes_masks"] == [
            key for key in ("learn.memory", "learn.micro_batch") if f"{key}=" in one.overrides
        ]
    assert found.best[0].gpu_hours < 0.8 * time_of(run("parallel.tp=8"), H100).gpu_hours(2000)


def test_a_search_on_64_gpus_evaluates_few_layouts() -> None:
    """Under 2 ms each: 3 policies x 3 memories x 3 micro-batches x 2 optimizers, with and without
    sequence parallelism at TP 2, 4 and 8.
    """
    assert search(run(), H100, 64).evaluated == 54 * (1 + 2 + 2 + 2)


def test_a_memory_state_of_the_recipe_is_the_start() -> None:
    found = search(run("learn.memory=lean"), H100, 2)
    assert {one.work.config.learn.memory for one in found.best} == {"lean", "leanest"}
    assert not found.best[0].changed
    kept = search(run("learn.state.logits=fp32"), H100, 4)  # wins over both names
    assert {one.work.config.learn.memory for one in kept.best} == {"default"}


def test_nothing_that_fits_names_the_smallest() -> None:
    """A device that has just the named bytes holds the named layout, and one byte less does not."""
    work, tiny = run(model="smollm2-135m"), replace(H100, capacity=GIB)
    with pytest.raises(ConfigError, match="The smallest, TP 3 x DP 1 with parallel.tp=3 ") as said:
        search(work, tiny, 3)
    words = said.value.fix.split(" with ")[1].split(",")[0].split()
    needed = memory_of(run(*words, model="smollm2-135m").check(), tiny).total
    assert f"{needed / GIB:.1f} GiB" in str(said.value)
    (only,) = search(work, replace(tiny, capacity=needed), 3).best
    assert only.overrides.split() == words
    with pytest.raises(ConfigError, match="The smallest"):
        search(work, replace(tiny, capacity=needed - 1), 3)


def test_what_no_layout_can_repair_is_said_as_it_is() -> None:
    with pytest.raises(ConfigError, match=r"^data\.seq_length = 8192"):
        search(run("data.seq_length=8192"), H100, 2)
