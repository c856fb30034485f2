"""Every verb on two ranks, every verb started twice, and ranks that fail: one message, an exit
code, no hang, and whole artefacts.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

from megamask import load_masks
from megamask.errors import EXIT_UNAVAILABLE, EXIT_USER_ERROR, ArtifactError
from megamask.learn.heartbeat import Heartbeat
from megamask.learn.loop import Run
from megamask.masks import from_snapshot
from megamask.masks.snapshot_steps import snapshot_path, snapshot_steps
from megamask.parallel import roll_call
from megamask.process import lock, watchdog
from megamask.process.lock import locked
from megamask.process.place import this_place
from megamask.verbs import dispatch
from megamask.verbs.status import read_records
from megamask.verbs.table import VERBS
from tests.e2e.program import Finished, contents, here, refusal
from tests.e2e.ranks import run_program

pytestmark = pytest.mark.slow
Settings = Callable[[Path], list[str]]
LEARN = ("learn.steps=4", "learn.snapshot.every=2", "data.seq_length=16")
# Words of verbs, and what a verb says that cannot work on this run.
WORDS = {
    "learn": (*LEARN, "learn.prior.mask=wanda"),
    "prune": ("prune.methods=[magnitude, wanda]",),
    "evaluate": ("evaluate.masks={wanda: wanda, learned: learned}",),
    "diff": ("wanda", "magnitude", "--json", "{run}/diff.json"),
    "extract": ("wanda", "{run}/extracted.safetensors"),
    "import": ("{run}/none.npz", "{run}/imported.safetensors"),
    "push": ("owner/name", "--dry-run"),
    "inspect": ("wanda",),
    "plan": ("--model", "llama2-7b", "--tp=8", "--json", "{run}/plan.json"),
    "export": ("export.mask=wanda",),
    "reorder": ("{run}/reordered",),
    "tasks": ("tasks.include={run}/none",),
    "sensitivity": ("sensitivity.mask=wanda",),
    "recover": ("recover.mask=wanda", "recover.method=reconstruct"),
}
REFUSED = {
    "gguf": "model.gguf",
    "import": "none.npz",
    "tasks": "tasks.",
    "speed": "device = ",
}
# In the order of a run; verbs that are not named here follow.
ORDER = ("convert", "tokenize", "prune", "learn", "export", "evaluate", "report")
# Verbs that hand a job to another program, or ask for a run that goes on.
ELSEWHERE = {"submit", "status", "stop"}


def words(verb: str, run_dir: Path) -> list[str]:
    return [word.replace("{run}", str(run_dir)) for word in WORDS.get(verb, ())]


def messages(ranks: list[Finished]) -> list[str]:
    """What all ranks said of errors."""
    assert not any("Traceback" in one.stderr for one in ranks), ranks
    lines = [line for one in ranks for line in one.stderr.splitlines()]
    return [line for line in lines if line.startswith("megamask: ")]


def left_behind(run_dir: Path) -> list[Path]:
    """Locks and temporary files."""
    return [path for end in ("lock", "tmp") for path in run_dir.rglob(f".*.{end}")]


ALL = [*ORDER, *(verb for verb in VERBS if verb not in {*ORDER, *ELSEWHERE})]
# The verbs whose ranks work together, and the text that they need. The others have a test of the
# whole table in one process, tests/unit/verbs/test_dispatch.py.
TOGETHER = [verb for verb in ORDER if VERBS[verb].is_parallel or verb == "tokenize"]
TABLE = pytest.mark.parametrize(
    "verbs", [TOGETHER, pytest.param(ALL, marks=pytest.mark.nightly)], ids=["parallel", "all"]
)


@TABLE
def test_verbs_on_two_ranks(
    verbs: list[str], prepared: Path, settings: Settings, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    for verb in verbs:
        ranks = run_program(verb, *settings(run_dir), *words(verb, run_dir))
        codes = [one.code for one in ranks]
        if verb in REFUSED:
            (message,) = messages(ranks)
            assert EXIT_USER_ERROR in codes and REFUSED[verb] in message, ranks
        else:
            assert codes == [0, 0] and not messages(ranks), (verb, ranks)
        assert VERBS[verb].is_parallel or not ranks[1].stdout, (verb, ranks[1])
    assert not left_behind(run_dir)
    made = ("diff.json", "extracted.safetensors", "plan.json", "report.html", "export/config.json")
    assert verbs is not ALL or all((run_dir / name).exists() for name in made)
    # The one-shot masks of the calibration text do not depend on who computes them, but for ties.
    for method in ("magnitude", "wanda"):
        found, expected = (
            load_masks(folder / "masks" / f"{method}.safetensors") for folder in (run_dir, prepared)
        )
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    found = Heartbeat.read(run_dir / "learn")
    assert found is not None and (found.state, found.step, found.world) == ("finished", 4, 2)


def meet() -> None:
    """A start that holds its locks works on when the other start has been refused, so the two meet
    however fast the machine is. A start that is never refused, such as a reader, meets nobody.
    """

    @contextmanager
    def meeting(what: str, writes: list[Path], reads: list[Path]) -> Iterator[None]:
        (run_dir,) = (word[8:] for word in sys.argv if word.startswith("run_dir="))
        refused = Path(run_dir).with_name(f"{what} was refused")
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(what, writes, reads))
            except ArtifactError:
                refused.touch()
                raise
            end = time.monotonic() + 30
            while writes and not refused.exists() and time.monotonic() < end:
                time.sleep(0.01)
            yield

    # The holder waits to be met, so all that a refusal needs is the time to write its name.
    lock.PATIENCE = lock.SETTLE
    dispatch.locked = meeting  # type: ignore[attr-defined, assignment]


@TABLE
def test_verbs_started_twice(
    verbs: list[str], prepared: Path, settings: Settings, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    for verb in verbs:
        given = [*settings(run_dir), *words(verb, run_dir)]
        both = run_program(verb, *given, launcher=None, prepare="tests.e2e.test_ranks:meet")
        codes = sorted(one.code for one in both)
        if verb in REFUSED:
            assert codes == [EXIT_USER_ERROR, EXIT_USER_ERROR], (verb, both)
        elif VERBS[verb].writes:
            assert codes == [0, EXIT_USER_ERROR], (verb, both)
            told = refusal(next(one for one in both if one.code))
            assert f"is being written by megamask {verb}" in told, told
        else:
            assert codes == [0, 0], (verb, both)
    assert not left_behind(run_dir)
    for method in ("magnitude", "wanda"):
        found, whole = (
            load_masks(folder / "masks" / f"{method}.safetensors") for folder in (run_dir, prepared)
        )
        assert all(torch.equal(found[name], whole[name]) for name in whole)
    here("inspect", *settings(run_dir), "learned")
    names = [name for name in contents(prepared / "weights") if name.endswith(".distcp")]
    assert names and all((run_dir / "weights" / name).exists() for name in names)


def test_tasks_of_srun_are_ranks(run_dir: Path, settings: Settings) -> None:
    """Without torchrun: two tasks that each took themselves for rank 0 would hold the same lock."""
    given = ("learn.steps=1", "data.seq_length=16", "parallel.tp=2")
    ranks = run_program("learn", *settings(run_dir), *given, launcher="srun")
    assert [one.code for one in ranks] == [0, 0] and not messages(ranks), ranks
    found = Heartbeat.read(run_dir / "learn")
    assert found is not None and (found.state, found.world, found.holder.job) == (
        "finished",
        2,
        "7",
    )


def test_a_mistake_of_all_ranks_is_told_once(run_dir: Path, settings: Settings) -> None:
    cases: list[tuple[str, list[str]]] = [
        ("learn", ["learn.prior.mask=absent"]),  # before the ranks meet
        ("prune", ["parallel.tp=2", "parallel.sequence_parallel=true", "calibration.seq_length=7"]),
        ("evaluate", ["evaluate.masks={x: absent}"]),
        ("learn", ["learn.micro_batch=7"]),
    ]
    for verb, overrides in cases:
        ranks = run_program(verb, *settings(run_dir), *overrides)
        assert len(messages(ranks)) == 1, ranks
        assert ranks[0].code == EXIT_USER_ERROR
        assert max(one.seconds for one in ranks) < 60


def fail_on_rank_1() -> None:
    """Rank 1 raises in its second step, while rank 0 waits for the gradients."""
    step = Run._step

    def failing(self: Run) -> None:
        if self.mesh.rank == 1 and self.progress.step == 1:
            raise ValueError("rank one has had enough")
        step(self)

    Run._step = failing  # type: ignore[method-assign]


def hang_on_rank_1() -> None:
    """Rank 1 sleeps in its first step, which may take three seconds here."""
    step, expect = Run._step, watchdog.Watchdog.expect
    watchdog.GRACE, in_step = 3.0, list[int]()

    def hanging(self: Run) -> None:
        in_step.append(self.progress.step)
        self._show("learning")
        if self.mesh.rank == 1:
            time.sleep(600)
        step(self)

    def expect_soon(self: watchdog.Watchdog, what: str, seconds: float) -> None:
        is_first = in_step == [0] and what.startswith("progress towards the end of the first step")
        expect(self, what, 3.0 if is_first else seconds)

    Run._step = hanging  # type: ignore[method-assign]
    watchdog.Watchdog.expect = expect_soon  # type: ignore[method-assign]


def other_rate_on_rank_1() -> None:
    """Rank 1 was started with another learning rate, and rank 0 is slow to say so."""
    import megamask.config.load as load

    if this_place().rank == 0:
        roll_call.POLL = 0.5
    read = load.read_settings

    def other(recipe: Path | None, overrides: list[str]) -> object:
        more = ["learn.optimizer.lr=0.5"] if this_place().rank == 1 else []
        return read(recipe, [*overrides, *more])

    load.read_settings = other  # type: ignore[assignment]


def older_snapshot_on_rank_1() -> None:
    """Rank 1 looked for the newest snapshot before rank 0 did, and another run saved meanwhile."""
    if this_place().rank == 1:
        from_snapshot.newest_snapshot = lambda folder: snapshot_path(
            folder, snapshot_steps(folder)[0]
        )


HERE = "tests.e2e.test_ranks"


def test_a_rank_that_fails_is_heard_and_ends_the_job(run_dir: Path, settings: Settings) -> None:
    fault = f"{HERE}:fail_on_rank_1"
    zero, one = run_program("learn", *settings(run_dir), *LEARN, prepare=fault)
    assert one.code == 1 and "ValueError: rank one has had enough" in one.stderr
    assert "megamask: error (rank 1): Traceback" in one.stderr
    assert zero.code not in (0, EXIT_USER_ERROR) and "Traceback" not in zero.stderr, zero
    assert max(zero.seconds, one.seconds) < 60  # the time to load included; gloo's is minutes
    found = Heartbeat.read(run_dir / "learn")
    assert found is not None and found.step == 1


def test_ranks_that_hang_say_where(run_dir: Path, settings: Settings) -> None:
    fault = f"{HERE}:hang_on_rank_1"
    ranks = run_program("learn", *settings(run_dir), *LEARN, prepare=fault)
    assert EXIT_UNAVAILABLE in [one.code for one in ranks], ranks
    stacks = [(run_dir / "learn" / "logs" / f"stacks-rank-{rank}.txt") for rank in (0, 1)]
    assert "in hanging" in stacks[1].read_text() and "in hanging" in stacks[0].read_text()
    waiting = "torch/distributed"
    assert waiting in stacks[0].read_text() and waiting not in stacks[1].read_text()
    said = "no progress towards the end of the first step (parallel.first_step_minutes) within 0.05"
    assert any(said in one.stderr for one in ranks)
    # Where the hanging rank ends first, the other loses it, and says so before its own time is up.
    found = Heartbeat.read(run_dir / "learn")
    assert found is not None and found.step == 0 and found.state in ("learning", "failed")


def test_ranks_with_other_settings_are_refused(run_dir: Path, settings: Settings) -> None:
    fault = f"{HERE}:other_rate_on_rank_1"
    before = contents(run_dir)
    ranks = run_program("learn", *settings(run_dir), *LEARN, prepare=fault)
    (message,) = messages(ranks)
    assert "learn.optimizer.lr = 0.5: rank 1 on" in message
    assert [one.code for one in ranks] == [EXIT_USER_ERROR] * 2
    # Had rank 1 left before rank 0, the launcher would have ended rank 0, perhaps before its word.
    assert ranks[0].seconds < ranks[1].seconds
    assert not (run_dir / "learn" / "snapshots").exists() and contents(run_dir) == before


@pytest.mark.parametrize("key", ["learn.prior.mask={}", "evaluate.masks={{x: {}}}"])
def test_ranks_with_other_inputs_are_refused(
    key: str, run_dir: Path, general: Path, settings: Settings
) -> None:
    """The settings are the same, and the files that they name are not."""
    words, verb = key.format(general / "learn" / "snapshots"), key.partition(".")[0]
    fault = f"{HERE}:older_snapshot_on_rank_1"
    ranks = run_program(verb, *settings(run_dir), words, prepare=fault)
    (message,) = messages(ranks)
    named = "content.prior = " if verb == "learn" else "digests.x"
    assert "rank 1 on" in message and f"has other inputs than rank 0: {named}" in message
    # A launcher starts such a job again, whichever rank it asks.
    assert [one.code for one in ranks] == [EXIT_UNAVAILABLE] * 2
    assert not (run_dir / "learn" / "metrics.jsonl").exists()


def test_deterministic_algorithms_change_no_bit_on_a_cpu(
    run_dir: Path, settings: Settings, tmp_path: Path
) -> None:
    masks, metrics = [], []
    for asked in ("false", "true"):
        folder = Path(shutil.copytree(run_dir, tmp_path / asked))
        here("learn", *settings(folder), "learn.steps=2", f"deterministic={asked}")
        masks.append(load_masks(folder / "masks" / "learned.safetensors"))
        metrics.append([
            {key: record.get(key) for key in ("step", "loss", "grad_norm", "perplexity")}
            for record in read_records(folder / "learn" / "metrics.jsonl")
        ])  # fmt: skip
    assert metrics[0] == metrics[1] and metrics[0][-1]["perplexity"] and metrics[0][1]["loss"]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
