"""Text that every Python installation carries: the source of the standard library, and the English
prose in it.

The two domains share text, because a docstring is part of its file. So the prose of a file comes
with the source of the file: a split of both domains by the hash of the source keeps a held-out
docstring out of the training files too.
"""

from __future__ import annotations

import ast
import inspect
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

# pydoc_data belongs to the prose domain; encodings holds tables that repeat each other.
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idlelib",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "pydoc_data",
    "encodings",
}
SKIPPED_PREFIXES = ("_sysconfigdata", "sitecustomize")  # written for one machine
MIN_PARAGRAPH = 40  # characters; a shorter paragraph may repeat ("Return True.")
MIN_DOCSTRING = 120
MIN_DOCUMENT = 400
MIN_PROSE_SHARE = 0.85  # letters and spaces among the characters


def sources() -> Iterator[str]:
    """The standard library's Python files, sorted by path, each text once."""
    seen: set[str] = set()
    for file in _files(Path(sysconfig.get_paths()["stdlib"])):
        source = _read(file)
        if source and source not in seen:
            seen.add(source)
            yield source


def prose() -> Iterator[tuple[str, str]]:
    """Pairs (English prose, the text that it was taken from).

    The pairs are Python's help topics, then the docstrings of each library file. A paragraph stays
    only where it comes first: topics quote each other, and a quoted paragraph could otherwise be
    in the training text and in the held-out text.
    """
    seen: set[str] = set()
    for topic in _topics():
        text = _unseen_paragraphs(topic, seen)
        if len(text) >= MIN_DOCUMENT:
            yield text, topic
    for source in sources():
        text = _unseen_paragraphs("\n\n".join(_docstrings(source)), seen)
        if len(text) >= MIN_DOCUMENT:
            yield text, source


def _files(root: Path) -> list[Path]:
    files = (file for file in root.rglob("*.py") if not file.name.startswith(SKIPPED_PREFIXES))
    return sorted(
        file for file in files if SKIPPED_FOLDERS.isdisjoint(file.relative_to(root).parts)
    )


def _read(file: Path) -> str:
    try:
        with tokenize.open(file) as stream:  # honours the file's coding line
            return stream.read()
    except (OSError, SyntaxError, UnicodeDecodeError):  # a template, not Python
        return ""


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return []
    return [inspect.cleandoc(topics[label]) for label in sorted(topics)]


def _docstrings(source: str) -> list[str]:
    """The prose-like docstrings of a file, in the order of the file."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    owners = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    owners.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for text in map(ast.get_docstring, owners) if text and _is_prose(text)]


def _is_prose(text: str) -> bool:
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return (
        len(text) >= MIN_DOCSTRING
        and letters >= MIN_PROSE_SHARE * len(text)
        and "." in text
        and ">>>" not in text
    )


def _unseen_paragraphs(text: str, seen: set[str]) -> str:
    unseen: list[str] = []
    for paragraph in text.split("\n\n"):
        words = " ".join(paragraph.split())
        if words in seen:
            continue
        if len(words) >= MIN_PARAGRAPH:
            seen.add(words)
        unseen.append(paragraph.rstrip())
    return "\n\n".join(unseen).strip()
