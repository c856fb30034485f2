"""Nothing in the package is dead, and no rule is written twice."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from vulture import Vulture

REPO = Path(__file__).resolve().parents[2]
PACKAGE = sorted((REPO / "megamask").rglob("*.py"))
KINDS = {"function", "method", "class", "property", "import"}
# Names that only others use -> who does.
USED_ELSEWHERE = {
    "__getattr__": "Python",
    "__dir__": "Python",
    "_apply_named_settings": "pydantic",
    "_check_number_of_samples": "pydantic",
    "_check_what_a_kind_reads": "pydantic",
    "_refuse_unusable_text": "pydantic",
    "_postprocess": "Megatron's model",
    "swap": "users of the package",
    "accelerate": "users of the package",
    "fingerprint_model": "users who compare models in memory (docs/python.md)",
    "unique_identifiers": "Megatron's blended dataset",
    "full_logits": "tests of parity",
    "reordered": "tests that look at the tensors",
    "get_emb": "Megatron's rotary embedding",
    "find_class": "pickle",
    "persistent_load": "pickle",
    "readable": "Python's buffered reader",
    "seekable": "Python's buffered reader",
    "handleError": "logging",
    "wait_stream": "Megatron's sum of gradients",
    "wait_event": "Megatron's sum of gradients",
    "eot_token_id": "lm-evaluation-harness",
    "_loglikelihood_tokens": "lm-evaluation-harness",
    "loglikelihood_rolling": "lm-evaluation-harness",
    "generate_until": "lm-evaluation-harness",
}
LONG = 40  # characters of a literal that must not stand in two files


def unused(paths: list[Path]) -> dict[str, str]:
    """Name -> place of every function, method, class, property and import that nobody names."""
    vulture = Vulture()
    vulture.scavenge([str(path) for path in paths])
    found = [item for item in vulture.get_unused_code(min_confidence=60) if item.typ in KINDS]
    return {item.name: f"{item.filename}:{item.first_lineno}" for item in found}


def test_everything_is_used() -> None:
    users = [path for room in ("benchmarks", "studies") for path in (REPO / room).rglob("*.py")]
    found = unused([*PACKAGE, *users])
    package = f"{REPO / 'megamask'}/"
    here = {name: place for name, place in found.items() if place.startswith(package)}
    dead = {name: place for name, place in here.items() if name not in USED_ELSEWHERE}
    assert not dead, f"remove, or say in USED_ELSEWHERE who uses it: {dead}"
    stale = USED_ELSEWHERE.keys() - here.keys()
    assert not stale, f"remove from USED_ELSEWHERE, the package uses it or has it no more: {stale}"


def printers(paths: list[Path]) -> list[str]:
    """The places that call ``print``."""
    return [
        f"{path}:{node.lineno}"
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]


def test_verbs_print_through_tell(tmp_path: Path) -> None:
    """What a verb prints may come from a file, and a file's contents must not steer a terminal."""
    assert printers(sorted((REPO / "megamask" / "verbs").glob("*.py"))) == []
    (tmp_path / "verb.py").write_text("def run():\n    print(1)\n")
    assert printers([tmp_path / "verb.py"]) == [f"{tmp_path / 'verb.py'}:2"]


def resolvers(paths: list[Path]) -> list[str]:
    """The places that call ``resolve`` on anything but the place of a module."""
    return [
        f"{path}:{node.lineno}"
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr == "resolve"
        and "__file__" not in ast.unparse(node)
    ]


def test_links_are_followed_by_real_path(tmp_path: Path) -> None:
    """``Path.resolve`` raises RuntimeError at links in a circle, which no handler tells of."""
    assert resolvers(sorted((REPO / "megamask").rglob("*.py"))) == []
    (tmp_path / "module.py").write_text("here = Path(__file__).resolve()\nthere = a.resolve()\n")
    assert resolvers([tmp_path / "module.py"]) == [f"{tmp_path / 'module.py'}:2"]


def test_a_dead_function_is_found(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("def used(): ...\ndef dead(): ...\nused()\n")
    assert list(unused([tmp_path / "module.py"])) == ["dead"]


def literals(path: Path) -> Iterator[str]:
    """Long string literals of a file, and the constant parts of its f-strings; no docstrings."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or id(node) in docstrings:
            continue
        if isinstance(node.value, str) and len(node.value.strip()) >= LONG:
            yield node.value.strip()


def repeated(paths: list[Path]) -> dict[str, list[str]]:
    """Literal -> the files that hold it, where these are several."""
    places = defaultdict(set)
    for path in paths:
        for literal in literals(path):
            places[literal].add(path.name)
    return {literal: sorted(names) for literal, names in places.items() if len(names) > 1}


def test_no_rule_is_written_twice() -> None:
    """An error message in two files tells one rule in two places: one of them will be forgotten."""
    assert repeated(PACKAGE) == {}


@pytest.mark.parametrize(
    ("second", "expected"),
    [("x = 'A' + f'{{y}}{0}'", 1), ("def f():\n    '''{0}'''\n", 0), ("x = '{0}, no'", 0)],
)
def test_a_repeated_rule_is_found(tmp_path: Path, second: str, expected: int) -> None:
    rule = "every row of the mask must keep the same number"
    first, other = tmp_path / "first.py", tmp_path / "other.py"
    first.write_text(f"raise ValueError('{rule}')\n")
    other.write_text(second.format(rule) + "\n")
    assert len(repeated([first, other])) == expected
