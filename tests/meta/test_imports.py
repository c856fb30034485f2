"""Imports go one way through the rooms, and asking for help stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "megamask"

FOUNDATIONS = [
    "errors",
    "user_paths",
    "machine_errors",
    "liveness",
    "leftovers",
    "terminal",
    "megatron_range",
    "shipped",
    "process",
    "file_kinds",
    "storage",
    "safe_checkpoint",
    "tables",
    "config",
    "sparsity",
]  # each may import those before it
LEVELS = [
    *([room] for room in FOUNDATIONS),
    ["data", "parallel", "weights", "masks", "launch"],
    ["model", "runtime"],
    ["optim"],
    ["prepare"],
    ["oneshot", "learn", "evaluate", "export", "report"],
    ["plan", "publish", "recovery"],
    ["verbs", "pipeline"],
    ["__main__"],
]
LEVEL_OF = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
SIDEWAYS = {("masks", "weights")}


def imported_rooms(source: str, package: str) -> set[str]:
    """The megamask rooms that a module of ``package`` (``megamask.data``, say) imports, anywhere in
    its text.
    """
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (
                package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            )
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("megamask.")}
    return rooms


def violations(room: str, imported: set[str]) -> list[str]:
    return sorted(
        other
        for other in imported - {room}
        if other in LEVEL_OF and LEVEL_OF[other] >= LEVEL_OF[room] and (room, other) not in SIDEWAYS
    )


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if (
            path != PACKAGE / "__init__.py"
        ):  # the public names are fetched from their rooms on first use
            yield path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path


def test_every_room_has_a_level() -> None:
    assert {room for room, _ in modules()} == set(LEVEL_OF)


@pytest.mark.parametrize("room", sorted(LEVEL_OF))
def test_a_room_imports_only_lower_rooms(room: str) -> None:
    wrong = []
    for owner, path in modules():
        if owner == room:
            package = ".".join(["megamask", *path.relative_to(PACKAGE).parts[:-1]])
            wrong += [
                f"{path.relative_to(REPO)} imports {other}"
                for other in violations(room, imported_rooms(path.read_text(), package))
            ]
    assert not wrong, wrong


def test_a_wrong_import_is_seen() -> None:
    assert violations(
        "sparsity",
        imported_rooms("def f():\n    from megamask.learn import run", "megamask.sparsity"),
    ) == ["learn"]
    assert violations("data", imported_rooms("from ..parallel.mesh import x", "megamask.data")) == [
        "parallel"
    ]
    assert violations("data", imported_rooms("from megamask import masks", "megamask.data")) == [
        "masks"
    ]
    assert (
        violations("masks", imported_rooms("import megamask.weights.mapping", "megamask.masks"))
        == []
    )
    assert violations("weights", imported_rooms("import megamask.masks", "megamask.weights")) == [
        "masks"
    ]


@pytest.mark.parametrize(
    "code",
    [
        "import megamask",
        "import megamask.__main__ as m; m.main(['--help'])",
        "import megamask.config",
    ],
)
def test_torch_is_not_imported_for_help(code: str) -> None:
    heavy = "{'torch', 'transformers', 'megatron', 'numpy'} & set(sys.modules)"
    script = f"import sys; {code}; sys.exit(str({heavy}) if {heavy} else 0)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
