"""Nothing that the package reads is run: no code of it unpickles, evaluates or starts a shell, but
where a comment here says why it is safe.
"""

from __future__ import annotations

import ast
import builtins
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
FILES = sorted((REPO / "megamask").rglob("*.py"))
# Calls that run, or can run, what a file or a text holds; a keyword that makes the call safe.
DANGEROUS: dict[str, tuple[str, object] | None] = {
    "eval": None, "exec": None, "compile": None, "__import__": None,
    "os.system": None, "os.popen": None, "runpy.run_path": None,
    "pickle.load": None, "pickle.loads": None, "pickle.Unpickler": None,
    "pickle._Unpickler": None, "dill.load": None, "dill.loads": None, "cloudpickle.load": None,
    "joblib.load": None, "marshal.load": None, "marshal.loads": None, "shelve.open": None,
    "torch.load": ("weights_only", True),
    "yaml.load": ("Loader", "_Loader"), "yaml.unsafe_load": None, "yaml.full_load": None,
    "yaml.load_all": None, "pandas.read_pickle": None,
    # both unpickle .metadata, and dist_checkpointing.load common.pt
    "dist_checkpointing.load": None, "FileSystemReader": None,
}  # fmt: skip
# Keywords that switch such things on, whatever the call is.
KEYWORDS = {"trust_remote_code": True, "allow_pickle": True, "shell": True, "weights_only": False}
# file -> call: why it is safe
KNOWN = {
    ("megamask/safe_checkpoint.py", "pickle.Unpickler"): "a subclass: the classes of tensors alone",
    ("megamask/safe_checkpoint.py", "pickle._Unpickler"): "a subclass that fills new objects alone",
    ("megamask/model/checkpoint.py", "dist_checkpointing.load"): "after read_index, check_common",
    ("megamask/masks/from_snapshot.py", "FileSystemReader"): "load_snapshot calls read_index first",
    ("megamask/model/background_save.py", "pickle.loads"): "a nameless file that our fork wrote",
}


# where the same call stands several times
TIMES = {("megamask/safe_checkpoint.py", "pickle._Unpickler"): 2}


def name_of(node: ast.expr) -> str:
    """``torch.load`` of a call; empty for anything but names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = name_of(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def value_of(node: ast.expr) -> object:
    return node.value if isinstance(node, ast.Constant) else name_of(node)


def imported(tree: ast.AST) -> dict[str, str]:
    """Name in the file -> name that it was imported as, where the two differ."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {one.asname: one.name for one in node.names if one.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
    return found


def dangerous(name: str, names: dict[str, str]) -> str:
    """The entry of ``DANGEROUS`` that a name means: itself, or the end of its whole name."""
    first, dot, rest = name.partition(".")
    return entry(f"{names.get(first, first)}{dot}{rest}".removeprefix("builtins."))


@functools.cache
def entry(whole: str) -> str:
    """``dangerous`` of a whole name."""
    for known in DANGEROUS:
        # no method is the builtin function of its name, as model.eval
        if whole == known or (not hasattr(builtins, known) and whole.endswith(f".{known}")):
            return known
    return ""


def found_in(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of every dangerous call, base class or keyword of a text. A dangerous name that
    is passed on, as in ``map(pickle.loads, x)``, counts as a call.
    """
    tree = ast.parse(source)
    names = imported(tree)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and id(node) not in called:
            yield from ((node.lineno, name) for name in (dangerous(name_of(node), names),) if name)
        if not isinstance(node, ast.Call):
            continue
        name, given = name_of(node.func), {one.arg: value_of(one.value) for one in node.keywords}
        if name := dangerous(name, names):
            safe = DANGEROUS[name]
            if safe is None or given.get(safe[0]) != safe[1]:
                yield node.lineno, name
        for keyword, bad in KEYWORDS.items():
            if keyword in given and given[keyword] is not (not bad):
                yield node.lineno, keyword


def test_nothing_that_is_read_is_run() -> None:
    every: dict[tuple[str, str], list[str]] = {}
    for path in FILES:
        place = str(path.relative_to(REPO))
        for line, name in found_in(path.read_text()):
            every.setdefault((place, name), []).append(f"{place}:{line}: {name}")
    # another call in the same file is another decision
    known = {call: TIMES.get(call, 1) for call in KNOWN}
    found = [at for call, places in every.items() for at in places[known.get(call, 0) :]]
    assert len(FILES) > 100
    assert not KNOWN.keys() - every.keys(), "remove what is not there any more"
    assert not found, "read it safely, or say in KNOWN why it is safe"


@pytest.mark.parametrize(
    "text",
    [
        "import pickle; pickle.load(f)",
        "import torch; torch.load(p)",
        "torch.load(p, weights_only=False)",
        "yaml.load(t, Loader=yaml.Loader)",
        "np.load(p, allow_pickle=True)",
        "np.load(p, allow_pickle=flag)",
        "eval('1')",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "subprocess.run(c, shell=True)",
        "class U(pickle.Unpickler): ...",
        "class U(pickle._Unpickler): ...",
        "from pickle import loads; loads(b)",
        "from pickle import loads as read; read(b)",
        "import pickle as p; p.loads(b)",
        "from torch import load; load(p)",
        "import pickle; list(map(pickle.loads, b))",
        "from pickle import Unpickler\nclass U(Unpickler): ...",
        "from megatron.core import dist_checkpointing; dist_checkpointing.load(s, p)",
        "from megatron.core.dist_checkpointing import load; load(s, p)",
        "from torch.distributed.checkpoint.filesystem import FileSystemReader; FileSystemReader(p)",
        "import torch.distributed.checkpoint as dcp; dcp.FileSystemReader(p)",
    ],
)
def test_a_dangerous_call_is_found(text: str) -> None:
    assert list(found_in(text))


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(p, weights_only=True)",
        "yaml.load(t, Loader=_Loader)",
        "np.load(p, allow_pickle=False)",
        "model.eval()",
        "from json import loads; loads(t)",
        "from torch.distributed.checkpoint import load; load(s, storage_reader=r)",
        "def f(x: FileSystemReaders): ...",
        "re.compile('a')",
        "AutoTokenizer.from_pretrained(p, trust_remote_code=False)",
    ],
)
def test_a_safe_call_is_not(text: str) -> None:
    assert not list(found_in(text))
