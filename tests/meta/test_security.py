"""Nothing that the package reads is run: no code of it unpickles, evaluates or starts a shell, but
where a comment here says why it is safe.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
FILES = sorted((REPO / "megamask").rglob("*.py"))
# Calls that run, or can run, what a file or a text holds; a keyword that makes the call safe.
DANGEROUS: dict[str, tuple[str, object] | None] = {
    "eval": None, "exec": None, "compile": None, "__import__": None,
    "os.system": None, "os.popen": None, "runpy.run_path": None,
    "pickle.load": None, "pickle.loads": None, "pickle.Unpickler": None, "dill.load": None,
    "joblib.load": None, "marshal.load": None, "marshal.loads": None, "shelve.open": None,
    "torch.load": ("weights_only", True),
    "yaml.load": ("Loader", "_Loader"), "yaml.unsafe_load": None, "yaml.full_load": None,
    "yaml.load_all": None, "pandas.read_pickle": None,
}  # fmt: skip
# Keywords that switch such things on, whatever the call is.
KEYWORDS = {"trust_remote_code": True, "allow_pickle": True, "shell": True, "weights_only": False}
# file -> call: why it is safe
KNOWN = {
    ("safe_checkpoint.py", "pickle.Unpickler"): "its subclass admits the classes of tensors alone",
    (
        "background_save.py",
        "pickle.loads",
    ): "a file without a name, which a fork of ours has written",
}


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


def found_in(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of every dangerous call, base class or keyword of a text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            yield from (
                (node.lineno, name) for base in node.bases if (name := name_of(base)) in DANGEROUS
            )
        if not isinstance(node, ast.Call):
            continue
        name, given = name_of(node.func), {one.arg: value_of(one.value) for one in node.keywords}
        if name in DANGEROUS:
            safe = DANGEROUS[name]
            if safe is None or given.get(safe[0]) != safe[1]:
                yield node.lineno, name
        for keyword, bad in KEYWORDS.items():
            if keyword in given and given[keyword] is not (not bad):
                yield node.lineno, keyword


def test_nothing_that_is_read_is_run() -> None:
    found = [
        f"{path.relative_to(REPO)}:{line}: {name}"
        for path in FILES
        for line, name in found_in(path.read_text())
        if (path.name, name) not in KNOWN
    ]
    assert len(FILES) > 100
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
        "re.compile('a')",
        "AutoTokenizer.from_pretrained(p, trust_remote_code=False)",
    ],
)
def test_a_safe_call_is_not(text: str) -> None:
    assert not list(found_in(text))
