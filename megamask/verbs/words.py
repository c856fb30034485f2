"""The words of a command line: a verb, a recipe, overrides and the arguments of the verb."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field
from typing import Any

from megamask.errors import ConfigError
from megamask.file_kinds import USABLE, can_be_a_path
from megamask.verbs.argument_field import words_of
from megamask.verbs.table import VERBS, Verb


@dataclass
class Request:
    """A command line, taken apart.

    Attributes:
        verb: its name.
        recipe: the file after ``--config``.
        overrides: ``key.sub=value`` words.
        arguments: of the verb itself, by the name of their field, as text; a list of texts for an
            argument that may come several times.
        dry_run: whether to print the resolved settings and stop.
    """

    verb: str
    recipe: str | None = None
    overrides: list[str] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)
    dry_run: bool = False


def parse(words: Sequence[str]) -> Request:
    """Take a command line apart. Shortcuts become overrides.

    Raises:
        ConfigError: no such verb (with the nearest name), an option that does not exist,
            ``--config`` without a file, a value that is missing or not taken, an argument too many.
    """
    name, *rest = words
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1, cutoff=0.5)
        raise ConfigError(
            "verb",
            name,
            f"one of {', '.join(VERBS)}",
            f"Did you mean {near[0]}?" if near else "Run megamask --help.",
        )
    verb, request = VERBS[name], Request(name)
    positional = list(verb.positional)
    while rest:
        word = rest.pop(0)
        flag, has_value, value = word.partition("=")
        if flag == "--config":
            request.recipe = _value(flag, value, has_value, rest)
        elif word == "--dry-run" and word not in verb.flags:
            request.dry_run = True
        elif word in verb.flags and verb.flags[word].metadata["kind"] is bool:
            request.arguments[verb.flags[word].name] = True
        elif flag in verb.flags and verb.flags[flag].metadata["kind"] is bool:
            raise ConfigError(
                flag, value, "takes no value", f"Write {flag} alone, or leave it out."
            )
        elif flag in verb.flags:
            request.arguments[verb.flags[flag].name] = _value(flag, value, has_value, rest)
        elif flag in verb.shortcuts:
            request.overrides.append(
                f"{verb.shortcuts[flag]}={_value(flag, value, has_value, rest)}"
            )
        elif word.startswith("-"):
            raise ConfigError("option", word, _options(name, verb), f"Run megamask {name} --help.")
        elif verb.positional and not _is_override(word):
            if not positional:
                takes = " ".join(words_of(one) for one in verb.positional)
                allowed = f"{name} takes {takes}, and key.sub=value"
                raise ConfigError("argument", word, allowed, "Leave it out.")
            if positional[0].metadata["many"]:
                request.arguments.setdefault(positional[0].name, []).append(word)
            else:
                request.arguments[positional.pop(0).name] = word
        else:
            request.overrides.append(_full(word, verb))
    return request


def build_arguments(name: str, given: dict[str, Any]) -> Any:
    """The arguments dataclass of the verb ``name``.

    Raises:
        ConfigError: an argument that is missing or has a value that is not allowed.
    """
    verb = VERBS[name]
    assert verb.arguments is not None
    there = [one for one in verb.fields if given.get(one.name) is not None]  # null: not given
    checked = {one.name: _checked(one, given[one.name]) for one in there}
    for one in verb.fields:
        if one.name not in checked and one.default is MISSING:
            takes = " ".join(words_of(other) for other in verb.positional)
            fix = f"Write megamask {name} {takes}."
            raise ConfigError(words_of(one), None, str(one.metadata["help"]), fix)
    return verb.arguments(**checked)


def _checked(one: Field[Any], value: Any) -> Any:
    flag = words_of(one).partition(" ")[0]
    if one.metadata["kind"] is bool:
        if isinstance(value, bool):
            return value
        raise ConfigError(flag, value, "true or false", "Correct it.")
    if isinstance(value, bool):
        raise ConfigError(flag, value, str(one.metadata["help"]), "Correct it.")
    if one.metadata["many"]:
        return tuple(_checked_text(one, flag, each) for each in value)
    return _checked_text(one, flag, value)


def _checked_text(one: Field[Any], flag: str, value: Any) -> Any:
    if not can_be_a_path(str(value)):
        raise ConfigError(flag, value, USABLE, "Correct it.")
    if one.metadata["kind"] is int:
        text = str(value)
        if not text.isdecimal() or len(text) > 6 or int(text) == 0:
            raise ConfigError(flag, value, "a whole number from 1 to 999,999", "Correct it.")
        return int(text)
    choices = one.metadata["choices"]
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        fix = f"Did you mean {near[0]}?" if near else "Correct it, or leave it out."
        raise ConfigError(flag, value, f"one of {', '.join(choices)}", fix)
    return str(value)


def _is_override(word: str) -> bool:
    """Whether a word sets a setting: ``a.b=c``, while a path may hold = after a slash."""
    key, sign, _ = word.partition("=")
    return bool(sign) and "/" not in key


def _full(word: str, verb: Verb) -> str:
    """The override with its whole key: ``nodes=2`` is ``launch.nodes=2`` to a verb with --nodes."""
    key, sign, value = word.partition("=")
    whole = verb.shortcuts.get(f"--{key.replace('_', '-')}")
    return f"{whole}{sign}{value}" if sign and whole else word


def _value(flag: str, value: str, has_value: str, rest: list[str]) -> str:
    """The value of a flag: after its =, or the next word."""
    if not has_value and rest:
        return rest.pop(0)
    if not value:
        fix = "Write --config my.yaml, or the name of a recipe: --config quickstart."
        allowed = "needs a recipe file or name" if flag == "--config" else "needs a value"
        raise ConfigError(
            flag, "", allowed, fix if flag == "--config" else "Write it after the flag."
        )
    return value


def _options(name: str, verb: Verb) -> str:
    own = ", ".join([*verb.flags, *shortcuts_of(verb)])
    allowed = "--config FILE, --dry-run, --help, or key.sub=value without dashes"
    return f"{allowed}; {name} also has {own}" if own else allowed


def shortcuts_of(verb: Verb) -> list[str]:
    """The flags that stand for settings, without those that are words of before."""
    return [flag for flag in verb.shortcuts if flag != "--footprint"]
