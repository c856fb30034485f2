"""Ranks that leave together: rank 0 tells what happened, wherever it happened."""

from __future__ import annotations

import errno
from dataclasses import dataclass

import pytest

from megamask.config import Config
from megamask.errors import (
    EXIT_BUG,
    EXIT_UNAVAILABLE,
    EXIT_USER_ERROR,
    ConfigError,
    DismissedError,
    MegamaskError,
    OtherRankError,
)
from megamask.parallel.mesh import start
from tests.parallel.ranks import meet_again, run_ranks

CONFIG = Config.model_validate({"device": "cpu", "parallel": {"threads": 1}})
REFUSED = ConfigError("key", 1, "must be 2", "Write 2.")
PASSING = OSError(errno.EIO, "Input/output error", "/data/one")
BUG = ValueError("this was not foreseen")
CASES: list[dict[int, Exception]] = [{}, {0: REFUSED}, {1: REFUSED}]  # rank -> failure
CASES += [{0: REFUSED, 1: PASSING}, {1: PASSING}, {1: BUG}]


@dataclass
class Left:
    kind: type
    text: str
    code: int


def leave(rank: int) -> list[Left | None]:
    """How this rank leaves in each of the cases; None = it goes on."""
    found: list[Left | None] = []
    for failures in CASES:
        with start(CONFIG) as mesh:
            left = None
            try:
                mesh.leave_together(failures.get(rank), "write")
            except Exception as error:
                code = error.code if isinstance(error, MegamaskError) else 0
                left = Left(type(error), str(error), code)
        found.append(left)
        meet_again()
    return found


def test_rank_0_tells_the_failure_of_any_rank() -> None:
    main, other = run_ranks(leave, 2)
    assert main.pop(0) is None and other.pop(0) is None
    assert [one.kind for one in other if one] == [DismissedError] * 5
    assert [one.kind for one in main if one] == [
        *[ConfigError, OtherRankError, ConfigError, OtherRankError, OtherRankError]
    ]
    assert [one.code for one in other if one] == [
        *[EXIT_USER_ERROR, EXIT_USER_ERROR, EXIT_UNAVAILABLE, EXIT_UNAVAILABLE, EXIT_BUG]
    ]
    for number, words in {1: str(REFUSED), 3: "/data/one: cannot be used", 4: "ValueError"}.items():
        told, left = main[number], other[number]
        assert told and left and told.code == left.code
        assert told.text.startswith("rank 1 on ") and words in told.text
    assert main[4] and "this was not foreseen" in main[4].text


def test_one_process_raises_its_own_failure() -> None:
    with start(CONFIG) as mesh:
        mesh.leave_together(None, "write")
        with pytest.raises(ConfigError, match="must be 2"):
            mesh.leave_together(REFUSED, "write")
