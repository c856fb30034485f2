"""A learning run that is killed, signalled or damaged: it ends with the same bits as one left
alone, or says what to do.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch

from megamask import load_masks
from megamask.config.nested import nest
from megamask.errors import EXIT_INTERRUPTED
from tests.e2e.program import (
    Program,
    assert_untouched,
    contents,
    here,
    in_process,
    in_ranks,
    refusal,
)

pytestmark = pytest.mark.slow

STEPS, EVERY, KILLS = 16, 2, 3
SEED = 3
RUN = (
    f"learn.steps={STEPS}",
    f"learn.snapshot.every={EVERY}",
    "learn.micro_batch=2",
    "learn.global_batch=2",
    "data.seq_length=16",
    # the other end-to-end tests run the defaults
    "learn.method=categorical",
    "learn.sampling.initial_noise=true",
)
MEASURED = (
    "loss",
    "lm_loss",
    "weight_norm",
    "grad_norm",
    "max_prob",
    "flip_rate",
    "prior_difference",
    "lr",
    "kappa",
    "tau",
)
Settings = Callable[[Path], list[str]]


def records(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl: the file may be growing."""
    path = run_dir / "learn" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [
        record
        for record in map(json.loads, (line for line in lines if line.endswith("\n")))
        if record["kind"] == kind
    ]


def last_step(run_dir: Path) -> int:
    return max((record["step"] for record in records(run_dir)), default=0)


def snapshots(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "learn" / "snapshots").glob("step-*"))


def newest_step(run_dir: Path) -> int:
    names = snapshots(run_dir)  # looked at once: the folder may be moved aside meanwhile
    return int(names[-1].removeprefix("step-")) if names else 0


@pytest.fixture(scope="module")
def whole(prepared: Path, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbed."""
    run_dir = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("whole") / "run"))
    here("learn", *settings(run_dir), *RUN)
    return run_dir


@pytest.fixture(scope="module")
def interrupted(
    prepared: Path, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same run, asked by SIGTERM to leave after its third step or a little later; it has two
    snapshots.
    """
    run_dir = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("interrupted") / "run"))
    stop(run_dir, settings, signal.SIGTERM)
    return run_dir


def stop(run_dir: Path, settings: Settings, number: signal.Signals) -> None:
    with Program("learn", *settings(run_dir), *RUN) as program:
        program.wait_until(lambda: last_step(run_dir) >= 3)
        program.process.send_signal(number)
        finished = program.wait()
    assert finished.code == EXIT_INTERRUPTED, finished.stderr
    assert (
        f"{number.name}: saved at step {last_step(run_dir)}; start again to go on"
        in finished.stderr
    )
    assert snapshots(run_dir)[-1] == f"step-{last_step(run_dir):08d}"
    assert last_step(run_dir) < STEPS
    assert not (run_dir / "masks" / "learned.safetensors").exists()


def assert_same_run(run_dir: Path, whole: Path) -> None:
    """Masks bit for bit, and every measured number of every step, each step once."""
    found, expected = (
        load_masks(folder / "masks" / "learned.safetensors") for folder in (run_dir, whole)
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [record["step"] for record in records(run_dir)] == list(range(1, STEPS + 1))
    assert all(name in record for record in records(whole) for name in MEASURED)
    for ours, theirs in zip(records(run_dir), records(whole), strict=True):
        known = [
            name for name in MEASURED if name != "flip_rate" or name in ours
        ]  # right after a resume nobody knows what flipped
        assert {name: ours[name] for name in known} == {name: theirs[name] for name in known}
    assert sum("flip_rate" in record for record in records(run_dir)) >= STEPS - KILLS - 1
    evaluations = [
        [(one["step"], one["perplexity"]) for one in records(folder, "evaluation")]
        for folder in (run_dir, whole)
    ]
    assert evaluations[0] == evaluations[1]


def kill_after(steps: int, delay: float, run_dir: Path, settings: Settings) -> None:
    """SIGKILL, ``delay`` seconds after this process has taken ``steps`` steps."""
    metrics, resumed = run_dir / "learn" / "metrics.jsonl", newest_step(run_dir)
    former = (
        metrics.stat().st_ino if metrics.exists() else 0
    )  # a new process replaces the file before it adds to it
    with Program("learn", *settings(run_dir), *RUN) as program:
        program.wait_until(
            lambda: (
                metrics.exists()
                and metrics.stat().st_ino != former
                and last_step(run_dir) >= resumed + steps
            )
        )
        time.sleep(delay)
        assert program.process.poll() is None, "it ended before it could be killed: raise STEPS"


def test_three_kills(
    run_dir: Path, whole: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    choose = random.Random(SEED)
    pace = (records(whole)[-1]["seconds"] - records(whole)[0]["seconds"]) / (STEPS - 1)
    for number in range(KILLS):
        # A snapshot is finished when the next begins at the latest: in the fourth step.
        steps, delay = choose.randint(4, 6), choose.uniform(0, pace)
        kill_after(steps, delay, run_dir, settings)
        with capsys.disabled():
            where = (
                f"{delay:.2f} s after {steps} steps, at step {last_step(run_dir)}, "
                f"newest snapshot {newest_step(run_dir)}"
            )
            print(f"\nkill {number + 1} of {KILLS} (seed {SEED}): {where}", end="", flush=True)
    assert newest_step(run_dir) > 0, (
        "every kill came before the first snapshot: nothing was resumed"
    )
    here("learn", *settings(run_dir), *RUN)
    assert_same_run(run_dir, whole)


def test_other_bits_would_be_seen(whole: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.copyfile(
        run_dir / "masks" / "sparsegpt.safetensors", run_dir / "masks" / "learned.safetensors"
    )
    with pytest.raises(AssertionError):
        assert_same_run(run_dir, whole)


def test_a_kill_while_a_snapshot_is_written(run_dir: Path, whole: Path, settings: Settings) -> None:
    folder = run_dir / "learn" / "snapshots"
    with Program("learn", *settings(run_dir), *RUN) as program:
        program.wait_until(lambda: bool(snapshots(run_dir)) and any(folder.glob(".step-*.tmp")))
    left = [path.name for path in folder.glob(".*")]
    assert left, "the snapshot was finished before the kill"
    here("learn", *settings(run_dir), *RUN)
    assert not list(folder.glob(".*"))
    assert_same_run(run_dir, whole)


def test_sigterm_saves_and_a_restart_ends_the_same(
    interrupted: Path, whole: Path, settings: Settings, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(interrupted, tmp_path / "run"))
    here("learn", *settings(run_dir), *RUN)
    assert_same_run(run_dir, whole)


def test_two_ranks_finish_what_one_began(
    interrupted: Path, whole: Path, settings: Settings, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(interrupted, tmp_path / "run"))
    in_ranks(2, ["learn", *settings(run_dir), *RUN, "parallel.tp=2"])
    assert [record["step"] for record in records(run_dir)] == list(range(1, STEPS + 1))
    ours, theirs = (
        load_masks(folder / "masks" / "learned.safetensors") for folder in (run_dir, whole)
    )
    differ = sum(int((ours.index(name) != theirs.index(name)).sum()) for name in ours) / sum(
        ours.index(name).numel() for name in ours
    )
    # Near ties: sums over ranks round differently. The whole run moves some percent of the groups.
    assert differ <= 0.005


def test_sigusr1_saves_and_a_restart_ends_the_same(
    run_dir: Path, whole: Path, settings: Settings
) -> None:
    stop(run_dir, settings, signal.SIGUSR1)
    here("learn", *settings(run_dir), *RUN)
    assert_same_run(run_dir, whole)


@pytest.mark.parametrize("launch", [None, 2], ids=["plain", "torchrun"])
def test_a_signal_to_the_whole_group_after_a_periodic_snapshot_saves(
    run_dir: Path, settings: Settings, launch: int | None
) -> None:
    """Launchers signal process groups, and a save has helper processes: they must not die of the
    signal that asks for the next save.
    """
    ranks = ["learn.global_batch=4"] if launch else []
    with Program("learn", *settings(run_dir), *RUN, *ranks, launch=launch) as program:
        program.wait_until(lambda: newest_step(run_dir) >= EVERY and last_step(run_dir) > EVERY)
        os.killpg(program.process.pid, signal.SIGTERM)
        finished = program.wait()
    # torchrun reports 1, whatever its processes ended with
    assert finished.code == (1 if launch else EXIT_INTERRUPTED), finished.stderr
    assert f"SIGTERM: saved at step {last_step(run_dir)}" in finished.stderr
    assert newest_step(run_dir) == last_step(run_dir) < STEPS
    assert not list((run_dir / "learn" / "snapshots").glob(".*")), "a half-written snapshot"


def test_starting_over_puts_the_old_snapshots_aside(
    whole: Path, settings: Settings, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(whole, tmp_path / "run"))
    (run_dir / "masks" / "learned.safetensors").unlink()
    before = snapshots(run_dir)
    with Program("learn", *settings(run_dir), *RUN, "learn.resume=false") as program:
        program.wait_until(lambda: newest_step(run_dir) in range(1, STEPS - 2 * EVERY))
        program.process.send_signal(signal.SIGTERM)
        finished = program.wait()
    assert finished.code == EXIT_INTERRUPTED, finished.stderr
    aside = run_dir / "learn" / "snapshots-before-1"
    assert sorted(path.name for path in aside.glob("step-*")) == before
    assert str(aside) in finished.stderr
    assert (
        0 < newest_step(run_dir) == last_step(run_dir) < STEPS
    )  # its own newest, not that of the run before
    here("learn", *settings(run_dir), *RUN)
    assert_same_run(run_dir, whole)


TEARS: dict[str, Callable[[Path], None]] = {
    "tensors cut": lambda folder: cut(folder / "__0_0.distcp"),
    "tensors gone": lambda folder: (folder / "__0_1.distcp").unlink(),
    "index cut": lambda folder: cut(folder / ".metadata"),
    "index gone": lambda folder: (folder / ".metadata").unlink(),
    "format gone": lambda folder: (folder / "metadata.json").unlink(),
    "common cut": lambda folder: cut(folder / "common.pt"),
    "note gone": lambda folder: (folder / "megamask.json").unlink(),
    "note cut": lambda folder: cut(folder / "megamask.json"),
}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_snapshot_is_named_and_kept(
    interrupted: Path, settings: Settings, tmp_path: Path, tear: str
) -> None:
    run_dir = Path(shutil.copytree(interrupted, tmp_path / "run"))
    newest = run_dir / "learn" / "snapshots" / snapshots(run_dir)[-1]
    TEARS[tear](newest)
    before = contents(run_dir)
    message = refusal(in_process("learn", *settings(run_dir), *RUN))
    assert str(newest) in message
    assert (
        f"Delete {newest} to resume from the one before, or all of {newest.parent} to start over."
        in message
    )
    assert_untouched(run_dir, before)


def test_the_advice_for_a_torn_snapshot_works(
    interrupted: Path, whole: Path, settings: Settings, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(interrupted, tmp_path / "run"))
    shutil.rmtree(run_dir / "learn" / "snapshots" / snapshots(run_dir)[-1])
    assert in_process("learn", *settings(run_dir), *RUN).code == 0
    assert_same_run(run_dir, whole)


@pytest.mark.parametrize(
    ("override", "key", "before"),
    [
        ("seed=7", "seed = 7", "1234"),
    ],
)
def test_another_setting_is_no_resume(
    interrupted: Path, settings: Settings, override: str, key: str, before: str
) -> None:
    held = contents(interrupted)
    message = refusal(in_process("learn", *settings(interrupted), *RUN, override))
    assert key in message
    assert f"was started with {before}" in message
    assert "use another run_dir, or start over with learn.resume=false" in message
    assert_untouched(interrupted, held)


def in_old_words(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a note as they were written before they got their names of today."""
    flat = {key: value for key, value in settings.items() if not key.startswith("learn.dist")}
    (coef, last), (eps, eps_rms) = (
        flat.pop("learn.weight_norm"),
        flat.pop("learn.optimizer.epsilon"),
    )
    assert flat.pop("learn.method") == "categorical" and flat.pop("data.eod") == "auto"
    flat |= {"learn.learner": "gumbel", "learn.distribution": "categorical"}
    flat |= {"learn.optimizer.eps": eps, "learn.optimizer.eps_rms": eps_rms}
    flat |= {
        "learn.weight_norm.coef": coef,
        "learn.weight_norm.decay": "none" if last else "linear",
    }
    flat |= {
        "learn.loss.kind": "lm",
        "learn.loss.share": 0.5,
        "learn.loss.temperature": 1.0,
    }
    flat |= {"data.append_eod": True, "data.eod_token": None, "learn.loss.top_k": None}
    return nest(flat)


@pytest.mark.parametrize(
    ("section", "override", "said"),
    [
        ("loss", "learn.distillation.temperature=1", None),
        ("loss", "learn.distillation.temperature=2", None),  # of distillation alone
        ("loss", "learn.distillation.share=1", "learn.distillation.share 0.0 -> 1.0"),
        ("optimizer.eps_rms", "learn.optimizer.epsilon=[1e-8, 0]", None),  # there was none
        (  # the default now
            "optimizer.eps_rms",
            "learn.optimizer.epsilon=[1e-8, 0.1]",
            "learn.optimizer.epsilon [1e-08, 0.0] -> [1e-08, 0.1]",
        ),
        ("distribution", "learn.method=categorical", None),
        ("distribution", "learn.method=subset", "was started with 'categorical'"),
    ],
)
def test_a_snapshot_older_than_a_setting_was_made_without_it(
    interrupted: Path,
    whole: Path,
    settings: Settings,
    tmp_path: Path,
    section: str,
    override: str,
    said: str | None,
) -> None:
    """Without a change the snapshot is that of the last step, so the resumed run only writes its
    mask. A change needs steps to work on.
    """
    run_dir = Path(shutil.copytree(interrupted if said else whole, tmp_path / "run"))
    (run_dir / "masks" / "learned.safetensors").unlink(missing_ok=True)
    note = run_dir / "learn" / "snapshots" / snapshots(run_dir)[-1] / "megamask.json"
    content = json.loads(note.read_text())
    content["settings"] = in_old_words(content["settings"])
    *path, last = section.split(".")
    del reduce(dict.__getitem__, path, content["settings"]["learn"])[last]
    note.write_text(json.dumps(content))
    finished = in_process("learn", *settings(run_dir), *RUN, override)
    assert finished.code == (2 if section == "distribution" and said else 0), finished.stderr
    assert (
        "changed for this run" not in finished.stderr if said is None else (said in finished.stderr)
    )
