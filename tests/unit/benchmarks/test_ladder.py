"""The steps of a lease from a kernel to a curve of losses, as far as they run without a GPU: the
programs that check and profile kernels are stood in for by scripts.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import bounds, ceilings, one_tile, real_model, sanitizer, semi_structured
from benchmarks.gpu.lease_parts import BY_NAME, Situation

HEADER = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'


def script(folder: Path, text: str) -> str:
    """An executable shell script."""
    path = folder / "program"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (0, "nothing found"),
        (sanitizer.FOUND, "failed: memcheck found something, see above"),
        (1, "failed: exit code 1"),
    ],
)
def test_a_checker_says_what_it_found(code: int, said: str, tmp_path: Path) -> None:
    program = script(tmp_path, f'echo "$@" > {tmp_path}/words; exit {code}')
    words = ["--device", "cuda", "--tools", "memcheck", "--checker", program]
    failed = sanitizer.main([*words, "--json", str(tmp_path / "found.json")])
    assert failed == (code != 0)
    assert json.loads((tmp_path / "found.json").read_text()) == {"memcheck": said}
    given = (tmp_path / "words").read_text()
    assert given.startswith("--tool memcheck --error-exitcode 9 ")
    assert given.endswith("-m benchmarks.gpu.one_tile --device cuda\n")


def test_a_checker_that_takes_too_long_or_is_missing_is_said(tmp_path: Path) -> None:
    words = ["--device", "cuda", "--tools", "racecheck", "--json", str(tmp_path / "found.json")]
    slow = script(tmp_path, "exec sleep 20")
    begin = time.monotonic()
    assert sanitizer.main([*words, "--checker", slow, "--seconds", "0.3"]) == 0
    assert time.monotonic() - begin < 10
    assert json.loads((tmp_path / "found.json").read_text())["racecheck"] == "not done after 0 s"
    assert sanitizer.main([*words, "--checker", "no-such-program"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["racecheck"]
    assert found == "no-such-program is not on this machine"


def counted(number: int, name: str, values: dict[str, float], unit: str = "us") -> list[str]:
    units = dict.fromkeys(bounds.METRICS, "%") | {bounds.TIME: unit}
    return [
        f'"{number}","7","{name}","{metric}","{units[metric]}","{value:,.2f}"'
        for metric, value in values.items()
    ]


def counters(memory: float, compute: float, issue: float, time_us: float) -> dict[str, float]:
    return dict(zip(bounds.METRICS, (memory, compute, issue, 40.0, time_us), strict=True))


def test_bounds_are_read_from_the_profiler_s_table(tmp_path: Path) -> None:
    lines = [
        "==PROF== Connected to process 7",
        HEADER,
        *counted(0, "forward", counters(78, 85, 91, 310.5)),
        *counted(1, "backward", counters(94, 70, 60, 1234.5e3), unit="ns"),
        *counted(2, "backward", counters(30, 20, 10, 5)),
    ]
    (tmp_path / "table").write_text("\n".join(lines) + "\n")
    program = script(tmp_path, f"cat {tmp_path}/table")
    file = tmp_path / "bounds.json"
    assert bounds.main(["--device", "cuda", "--profiler", program, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["kernels"]
    assert [row["kernel"] for row in rows] == ["forward", "backward", "backward"]
    assert [row["us"] for row in rows] == pytest.approx([310.5, 1234.5, 5])
    said = [row["bound"].partition(":")[0] for row in rows]
    assert said == ["instructions", "memory", "latency"]


def test_counters_that_are_forbidden_are_a_result(tmp_path: Path) -> None:
    program, file = script(tmp_path, "echo ==ERROR== ERR_NVGPUCTRPERM; exit 1"), tmp_path / "b.json"
    assert bounds.main(["--device", "cuda", "--profiler", program, "--json", str(file)]) == 0
    assert "exit code 1" in json.loads(file.read_text())["problem"]


def test_2_4_without_its_library_leaves_dense_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(semi_structured, "layer_shapes", lambda _: {"proj": (64, 64)})
    monkeypatch.setitem(semi_structured.TOKENS, "cpu", (16,))
    file = tmp_path / "semi.json"
    assert semi_structured.main(["--device", "cpu", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert {row["dtype"] for row in found["rows"]} == {"bf16", "fp8"}
    for row in found["rows"]:
        assert (row["2:4 ms"], row["2:4 error"], row["speed-up"]) == (None, None, None)
        if row["dtype"] == "bf16":
            assert row["dense ms"] > 0
            assert 0 < row["dense error"] <= semi_structured.ERRORS["bf16"]
    assert {"2:4, bf16", "2:4, fp8"} <= found["not possible"].keys()


def test_a_wrong_product_is_seen() -> None:
    x, weight = (
        torch.randn(8, 64).bfloat16(),
        semi_structured.weight_of(16, 64, torch.device("cpu")),
    )
    assert bool((weight.view(16, 16, 4) != 0).sum(-1).eq(2).all())
    case = semi_structured.in_bf16(x, weight)
    right, wrong = case.sides["dense"](), 1.05 * case.sides["dense"]()
    for found, verdict in ((right, False), (wrong, True), (wrong * torch.nan, True)):
        error = semi_structured.error_of(found, case.expected)
        row = {"dtype": "bf16", "dense error": error, "2:4 error": None}
        assert semi_structured.is_wrong(row) == verdict


def test_e4m3_keeps_three_bits() -> None:
    values = torch.randn(64, 64, dtype=torch.float64).float()
    codes, scale = semi_structured.in_e4m3(values)
    normal = values.abs() > 2**-6 * scale
    apart = ((codes.float() * scale - values) / values)[normal]
    assert apart.abs().max() <= 2.0**-4 and torch.isfinite(codes.float()).all()


def test_two_curves_are_compared_on_their_common_steps() -> None:
    mine = [3.0 - 0.01 * step for step in range(40)]
    found = real_model.distance(mine, [loss + 0.5 * (step >= 5) for step, loss in enumerate(mine)])
    assert found["common steps"] == 40 and found["apart at step 1"] == 0
    assert found["most apart in steps 1 to 10"] == pytest.approx(0.5)
    gap = found["the same of the other run"] - found["mean of the last tenth"]
    assert gap == pytest.approx(0.5)
    assert real_model.distance(mine[:7], mine)["common steps"] == 7


def test_learning_ends_after_its_seconds() -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: received.append(number))
    try:
        with real_model.ended_after(0.05):
            time.sleep(0.3)
        with real_model.ended_after(60):
            pass
        with real_model.ended_after(None):
            pass
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]


def test_the_curve_of_a_cpu_goes_to_the_real_model(tmp_path: Path) -> None:
    here = Situation("cuda", tmp_path, model=tmp_path, curve=tmp_path / "curve.json")
    command = BY_NAME["real-model"].command(here)
    assert command is not None
    assert command[command.index("--against") + 1] == str(tmp_path / "curve.json")
    limit = float(command[command.index("--learn-seconds") + 1])
    assert limit < BY_NAME["real-model"].limit


def test_the_rate_of_seconds_is_told_with_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, clock = [0], iter(range(10**6))

    def work() -> None:
        calls[0] += 1

    monkeypatch.setattr(ceilings, "now", lambda _device: 0.25 * next(clock))
    monkeypatch.setattr(ceilings, "clocks", lambda: "1500 MHz, 700 W")
    rows: Any = ceilings.steady(work, 1e12)["seconds"]
    assert len(rows) >= 2 and {row["clock"] for row in rows} == {"1500 MHz, 700 W"}
    assert all(row["TFLOP/s"] > 0 for row in rows) and calls[0] > 0


def test_a_kernel_that_is_wrong_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {"subset": "masked weight: 0.5 off, of 1"}
    names = {tuple(words): name for name, words in one_tile.RUNS.items()}
    monkeypatch.setattr(one_tile, "problem_of", lambda words, _: said.get(names[tuple(words)], ""))
    assert one_tile.main(["--device", "cpu"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert "subset: masked weight: 0.5 off, of 1" in printed and "lean: ok" in printed


@pytest.mark.nightly  # compiles kernels for the CPU that no other test needs
def test_every_kernel_of_a_cpu_is_right_on_one_tile() -> None:
    assert one_tile.main(["--device", "cpu"]) == 0
