"""YAML as recipes and overrides use it: YAML 1.2 scalars, and no text that expands without end."""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_DEPTH = 16  # recipes have four levels
MAX_VALUES = 20_000


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: ``2:4``, ``off`` and dates are text (YAML 1.1 reads 124, False and a date),
    ``1e-3`` is a number (YAML 1.1 reads text). ``0123`` is text, such as the name of an account:
    YAML 1.1 reads 83, and YAML 1.2 a number that has lost its zero.
    """


_REPLACED = ("int", "float", "bool", "timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9]{0,3999})$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$"
    ),
    list("-+.0123456789"),
)


def read_yaml(text: str | bytes) -> Any:
    """The value of a YAML text.

    Args:
        text: characters, or UTF-8 bytes.

    Raises:
        ValueError: the text is no YAML, not UTF-8, has a key of a mapping twice, or is too deep or
            too large once its aliases are expanded.
    """
    try:
        loader = _Loader(text.decode() if isinstance(text, bytes) else text)
        node = loader.get_single_node()
        _count(node, MAX_DEPTH)
        return None if node is None else loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    # A tag such as !!timestamp or !!python/name builds what it names from whatever stands there.
    except (yaml.YAMLError, TypeError, AttributeError, LookupError) as error:
        raise ValueError(str(error)) from None


def read_value(text: str) -> Any:
    """The value of a word of the command line, where nothing is a comment: ``/data/a #2`` is text.

    Raises:
        ValueError: as :func:`read_yaml`, or text follows a value that is no plain text.
    """
    value, node = read_yaml(text), yaml.compose(text, _Loader)
    rest = text if node is None else text[node.end_mark.index :]
    if not rest.strip():
        return value
    if node is None or (isinstance(node, yaml.ScalarNode) and node.style is None):
        return text.strip()
    raise ValueError(f"{rest.strip()} follows the value")


class _Dumper(yaml.SafeDumper):
    """Quotes every text value: ``2:4`` and ``1e-3`` must stay text for YAML 1.1 and 1.2 readers
    alike.
    """


def _quoted(dumper: yaml.SafeDumper, text: str) -> Any:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if text.isidentifier() else '"'
    )


_Dumper.add_representer(str, _quoted)


def write_yaml(values: dict[str, Any]) -> str:
    """The text that :func:`read_yaml` reads back to the same plain values, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _count(node: yaml.Node | None, depth: int, before: int = 0) -> int:
    """The number of values within ``node``, an alias counted each time.

    Nodes are counted and not what they become: a merge key (``<<``) expands its aliases as soon as
    the values are built.

    Raises:
        ValueError: they are too many or too deep, or a mapping has a key twice.
    """
    if depth < 0:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
    total = before + 1
    if total > MAX_VALUES:
        raise ValueError(f"it holds more than {MAX_VALUES:,} values")
    inner: list[yaml.Node] = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        _refuse_repeated(node)
        inner = [value for _, value in node.value]
        inner += [key for key, _ in node.value if not isinstance(key, yaml.ScalarNode)]
    for one in inner:
        total = _count(one, depth - 1, total)
    return total


def _refuse_repeated(node: yaml.MappingNode) -> None:
    """Refuse a key that a mapping has twice: YAML forbids it, and PyYAML takes the last.

    Raises:
        ValueError: there is one.
    """
    found: set[str] = set()
    for key in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
        if key in found and key != "<<":
            line = node.start_mark.line + 1
            raise ValueError(f"the mapping that begins in line {line} has the key {key!r} twice")
        found.add(key)
