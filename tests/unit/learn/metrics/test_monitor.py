"""The monitor writes real files: they are read back with what users read them with."""

import io
import json
import logging
import math
import os
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megamask.config import Config, build_config
from megamask.errors import ArtifactError, ConfigError
from megamask.learn.metrics import sinks
from megamask.learn.metrics.monitor import Monitor, Pace, peak_memory_gib
from megamask.learn.metrics.sinks import Console, Forgiving, MetricsFile, PackageLog, trim_metrics

VALUES = {
    "loss": 3.0,
    "lm_loss": 3.5,
    "weight_norm_term": 0.5,
    "grad_norm": 0.1,
    "max_prob": 0.7,
    "flip_rate": 0.012,
    "prior_difference": 0.03,
    "lr": 1e-3,
    "kappa": 100.0,
    "tau": 4.0,
}
FIELDS = {
    "kind",
    "step",
    "tokens",
    "seconds",
    "tokens_per_second",
    "memory_gib",
    "eta_seconds",
    *VALUES,
}


def quiet(*sinks: str) -> Config:
    return build_config({"device": "cpu", "learn": {"monitor": {"sinks": list(sinks)}}})


def learn(
    folder: Path, first: int, last: int, config: Config, loss: float = 3.0, total: int = 10
) -> None:
    with closing(
        Monitor(folder, config, total, 1024, is_main=True, resume_step=first - 1)
    ) as monitor:
        for step in range(first, last + 1):
            monitor.train(step, VALUES | {"loss": loss})
            if step % 2 == 0:
                monitor.evaluation(
                    step, {"code": 20.0 + step, "english": 30.0 + step}, {"is_best": True}
                )


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_file_has_the_agreed_fields(tmp_path: Path) -> None:
    learn(tmp_path, 1, 2, quiet())
    first, second, evaluation = records(tmp_path)
    assert set(first) == FIELDS
    assert (
        first["kind"] == "train"
        and first["step"] == 1
        and first["tokens"] == 1024
        and second["tokens"] == 2048
    )
    assert first["eta_seconds"] == pytest.approx(9 * 1024 / first["tokens_per_second"])
    assert (
        evaluation["kind"] == "evaluation"
        and evaluation["tokens"] == 2048
        and evaluation["is_best"] is True
    )
    assert evaluation["perplexity"] == {"code": 22.0, "english": 32.0}


def test_lines_are_on_disk_while_the_run_goes_on(tmp_path: Path) -> None:
    with closing(Monitor(tmp_path, quiet(), 10, 1024, is_main=True)) as monitor:
        monitor.train(1, VALUES)
        assert len(records(tmp_path)) == 1


def test_what_is_not_finite_is_still_json(tmp_path: Path) -> None:
    with closing(Monitor(tmp_path, quiet(), 10, 1024, is_main=True)) as monitor:
        monitor.train(1, VALUES | {"grad_norm": math.inf, "lm_loss": 1e6})
        monitor.evaluation(1, {"code": math.nan})
    train, evaluation = records(tmp_path)
    assert train["grad_norm"] is None and evaluation["perplexity"] == {"code": None}


def test_resume_leaves_every_step_once(tmp_path: Path) -> None:
    learn(tmp_path, 1, 7, quiet(), loss=1.0)  # killed after step 7; the last snapshot is of step 4
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 3, "lo')  # torn
    before = trim_copy(tmp_path, 4)
    assert [record["step"] for record in before] == [1, 2, 2, 3, 4, 4]
    learn(tmp_path, 5, 10, quiet(), loss=2.0)
    after = records(tmp_path)
    assert after[:6] == before
    assert [record["step"] for record in after if record["kind"] == "train"] == list(range(1, 11))
    assert [record["loss"] for record in after if record["kind"] == "train"] == [1.0] * 4 + [
        2.0
    ] * 6
    seconds = [record["seconds"] for record in after]
    assert seconds == sorted(seconds)  # the clock goes on where the killed run stood
    log = (tmp_path / "log.txt").read_text()
    assert "starting at step 0" in log and "resumed after step 4" in log
    assert not list(tmp_path.glob(".*.tmp"))


def trim_copy(folder: Path, step: int) -> list[dict[str, Any]]:
    """What trimming would keep, without touching the original."""
    copy = folder / "copy.jsonl"
    copy.write_bytes((folder / "metrics.jsonl").read_bytes())
    kept = trim_metrics(copy, step)
    assert [json.loads(line) for line in copy.read_text().splitlines()] == kept
    return kept


def test_a_pipe_in_the_place_of_metrics_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(ArtifactError, match="metrics.jsonl: is not a text: it is a FIFO"):
        trim_metrics(tmp_path / "metrics.jsonl", 4)


def test_starting_over_drops_the_old_metrics(tmp_path: Path) -> None:
    learn(tmp_path, 1, 6, quiet())
    learn(tmp_path, 1, 1, quiet())
    assert [record["step"] for record in records(tmp_path)] == [1]


def test_tensorboard_shows_every_step_once_after_a_resume(tmp_path: Path) -> None:
    config = quiet("tensorboard")
    learn(tmp_path, 1, 7, config, loss=1.0)
    time.sleep(
        1.1
    )  # event files carry the second of their making in their names, and are read in that order
    learn(tmp_path, 5, 10, config, loss=2.0)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (step, 1.0 if step < 5 else 2.0) for step in range(1, 11)
    ]
    assert [(event.step, event.value) for event in events.Scalars("perplexity/english")] == [
        (step, 30.0 + step) for step in (2, 4, 6, 8, 10)
    ]
    assert {f"train/{name}" for name in VALUES} <= set(events.Tags()["scalars"])


def test_wandb_offline_writes_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    learn(tmp_path, 1, 2, quiet("wandb_offline"))
    identity = (tmp_path / "wandb_id.txt").read_text()
    (run,) = (tmp_path / "wandb").glob(f"offline-run-*-{identity}")
    (store,) = run.glob("*.wandb")
    end = (
        time.monotonic() + 30
    )  # wandb's own process writes it, and may be behind on a busy machine
    while b"perplexity/english" not in store.read_bytes() and time.monotonic() < end:
        time.sleep(0.1)
    assert b"perplexity/english" in store.read_bytes()


def test_a_missing_wandb_is_said_and_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        sys.modules, "wandb", None
    )  # what the import system does for a package that is not there
    learn(tmp_path, 1, 1, quiet("wandb_offline"))
    assert (tmp_path / "log.txt").read_text().count("wandb is not installed") == 1
    assert len(records(tmp_path)) == 1


@pytest.mark.parametrize("sink", ["wandb_offline", "wandb", "tensorboard"])
def test_an_optional_sink_that_cannot_start_is_no_error_but_online(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sink: str
) -> None:
    """A mask does not depend on it; who asks for wandb online expects to see the run."""

    def fails(**settings: Any) -> None:
        raise wandb.Error("no service here")

    def breaks(*words: Any) -> None:
        raise TypeError("another numpy")

    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "init", fails)
    monkeypatch.setattr(sinks, "TensorBoard", breaks)
    if sink == "wandb":
        with pytest.raises(ConfigError, match="wandb could not start"):
            learn(tmp_path, 1, 1, quiet(sink))
        return
    learn(tmp_path, 1, 1, quiet(sink))
    name = sink.partition("_")[0]
    said = (tmp_path / "log.txt").read_text()
    assert f"nothing is written for {name}, which cannot start" in said
    assert len(records(tmp_path)) == 1


def test_a_login_is_asked_for_where_a_run_is_to_be_online(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wandb, asked = pytest.importorskip("wandb"), []

    def refuses(**words: Any) -> None:
        asked.append(words)
        raise ConnectionError("no route to the server")

    monkeypatch.setattr(wandb, "login", refuses)
    for chosen in ("wandb_offline", "tensorboard"):
        sinks.require_login(quiet(chosen))
    assert asked == []
    with pytest.raises(ConfigError, match="could not log in .no route.*name wandb_offline"):
        sinks.require_login(quiet("wandb"))
    assert asked == [{"verify": True}]
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed: told later, and no error
    sinks.require_login(quiet("wandb"))


def test_other_ranks_are_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with closing(Monitor(tmp_path / "learn", quiet(), 10, 1024, is_main=False)) as monitor:
        monitor.train(1, VALUES)
        monitor.evaluation(1, {"code": 2.0})
        monitor.note("hello")
    assert capfd.readouterr() == ("", "") and not (tmp_path / "learn").exists()


def test_the_log_takes_the_whole_package_and_gives_it_back(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("megamask")
    before = (list(logger.handlers), logger.propagate, logger.level)
    with closing(Monitor(tmp_path, quiet(), 10, 1024, is_main=True)) as monitor:
        logging.getLogger("megamask.data").info("shards opened")
        monitor.note("a note")
        monitor.train(1, VALUES)
        monitor.train(
            2, VALUES
        )  # within ten seconds of the first: not printed, the output is no terminal
    monitor.close()
    assert (list(logger.handlers), logger.propagate, logger.level) == before
    log, printed = (tmp_path / "log.txt").read_text(), capfd.readouterr().err
    for text in (log, printed):
        assert "shards opened" in text and "a note" in text
        assert (
            text.count("step 1/10  loss 3.000  lm 3.500  ppl 33.12  max-prob 0.700  flips 1.20%")
            == 1
            and "step 2/10" not in text
        )
    assert "ETA" in printed and "GiB" in printed


def test_console_rewrites_its_line_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    console = Console(stream)
    console.progress("step 1", is_due=False)
    console.message("found")
    console.progress("step 2", is_due=False)
    console.close()
    assert stream.getvalue() == "\r\033[Kstep 1\r\033[Kfound\nstep 1\r\033[Kstep 2\n"


def test_pace_leaves_out_evaluations_and_outliers() -> None:
    pace = Pace(step=0)
    time.sleep(0.3)  # a compile
    pace.step_done(1)
    for step in (2, 3, 4):
        time.sleep(0.02)
        pace.step_done(step)
    time.sleep(0.3)  # an evaluation
    pace.restart()
    time.sleep(0.02)
    assert 0.02 <= pace.step_done(5) < 0.15  # far below 0.3, with room for a busy machine


def test_memory_is_in_gib() -> None:
    assert (
        0.05 < peak_memory_gib(on_cuda=False) < 512
    )  # Python with torch loaded takes more than 50 MiB; in other units it falls outside


def test_a_full_disk_loses_metrics_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every file of the folder is the full device: steps go on, and each sink tells it once."""
    (tmp_path / "log.txt").symlink_to("/dev/full")
    file = Forgiving(FullFile(), "metrics.jsonl")
    for step in (1, 2, 3):
        file.write({"kind": "train", "step": step, "tokens": 1, "seconds": 1.0})
    file.close()
    said_of_it = [one for one in caplog.messages if one.startswith("metrics.jsonl")]
    assert said_of_it == ["metrics.jsonl: metrics are lost ([Errno 28] No space left on device)"]
    log = PackageLog(tmp_path / "log.txt", Console())
    for text in ("one", "two"):
        logging.getLogger("megamask").info(text)
    log.close()
    said = capsys.readouterr().err
    assert said.count("log.txt: lines are lost ([Errno 28]") == 1 and "Traceback" not in said
    assert "one\n" in said and "two\n" in said


class FullFile(MetricsFile):
    """Metrics that go to the full device."""

    def __init__(self) -> None:
        self._known = set()
        self._file = Path("/dev/full").open("w")  # noqa: SIM115 - closed by close


def test_no_escape_code_of_a_name_reaches_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = PackageLog(tmp_path / "log.txt", Console())
    logging.getLogger("megamask").info("wandb run %s", "a\x1b[31m\rb")
    log.close()
    assert r"a\x1b[31m\rb" in capsys.readouterr().err
    assert r"a\x1b[31m\rb" in (tmp_path / "log.txt").read_text()
