"""``python -m megamask VERB --config FILE key=value``: a table of verbs. Nothing heavy is imported
until a verb runs.
"""

from __future__ import annotations

import difflib
import importlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from megamask.errors import EXIT_OK, EXIT_USER_ERROR, ConfigError, MegamaskError

VERBS: dict[str, tuple[str, str]] = {  # verb: ("module:function", what it does)
    "gguf": ("megamask.verbs.gguf:run", "unpack a GGUF file into a Hugging Face folder"),
    "convert": (
        "megamask.verbs.convert:run",
        "Hugging Face folder -> Megatron weights, for any tensor parallel size",
    ),
    "tokenize": (
        "megamask.verbs.tokenize:run",
        "text domains -> token shards, some documents held out for evaluation",
    ),
    "prune": ("megamask.verbs.prune:run", "one-shot masks: magnitude, Wanda, SparseGPT"),
    "plan": (
        "megamask.verbs.plan:run",
        "memory, time and GPU-hours of a learning run, before anything is launched",
    ),
    "learn": (
        "megamask.verbs.learn:run",
        "learn the mask of the frozen model; resumes from the last snapshot",
    ),
    "evaluate": (
        "megamask.verbs.evaluate:run",
        "held-out perplexity of the dense model and of every mask",
    ),
    "export": (
        "megamask.verbs.export:run",
        "Hugging Face folder + mask file -> masked Hugging Face folder",
    ),
    "report": ("megamask.verbs.report:run", "pictures and report.html of a run"),
    "inspect": ("megamask.verbs.inspect:run", "print a mask file and verify it strictly"),
    "diff": ("megamask.verbs.diff:run", "how two masks differ, by layer and by kind of linear"),
    "extract": ("megamask.verbs.extract:run", "a snapshot's winners -> mask file"),
}

FLAGS: dict[str, dict[str, str]] = {  # verb: {flag: the setting it stands for}
    "plan": {
        "--model": "plan.model",
        "--pattern": "pattern",
        "--tp": "parallel.tp",
        "--dp": "plan.dp",
        "--gpu": "plan.gpu",
        "--micro": "learn.micro_batch",
        "--global-batch": "learn.global_batch",
        "--seq": "data.seq_length",
        "--steps": "learn.steps",
        "--footprint": "learn.footprint",
        "--json": "plan.out",
    },
    "diff": {"--json": "diff.out", "--picture": "diff.picture"},
}
ARGUMENTS: dict[
    str, dict[str, str]
] = {  # verb: {argument, by its place: the setting it stands for}
    "diff": {"A": "diff.a", "B": "diff.b"},
    "extract": {"SNAPSHOT": "extract.mask", "FILE": "extract.out"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code (0 done, 2 user error, 75 interrupted after a snapshot,
    130 Ctrl-C).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(_help())
        return EXIT_OK if arguments else EXIT_USER_ERROR
    try:
        verb, recipe, overrides = parse(arguments)
        from megamask.config import load_config  # pydantic and yaml: not needed for --help

        config = load_config(recipe, overrides)
        _talk()
        module, function = VERBS[verb][0].split(":")
        return getattr(importlib.import_module(module), function)(config) or EXIT_OK
    except MegamaskError as error:
        who = "" if os.environ.get("RANK", "0") == "0" else f" (rank {os.environ['RANK']})"
        print(f"megamask: error{who}: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("megamask: interrupted", file=sys.stderr, flush=True)
        return 130


def parse(arguments: Sequence[str]) -> tuple[str, Path | None, list[str]]:
    """Split the command line into verb, recipe and overrides; flags and arguments become overrides.

    Raises:
        ConfigError: no such verb (with the nearest name), an option that does not exist,
            ``--config`` without a file, an argument too many.
    """
    verb, *rest = arguments
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.5)
        raise ConfigError(
            "verb",
            verb,
            f"one of {', '.join(VERBS)}",
            f"Did you mean {near[0]}?" if near else "Run megamask --help.",
        )
    recipe: Path | None = None
    overrides: list[str] = []
    flags, arguments_left = FLAGS.get(verb, {}), list(ARGUMENTS.get(verb, {}).values())
    while rest:
        word = rest.pop(0)
        if word == "--config" or word.startswith("--config="):
            if not (name := word.partition("=")[2] or (rest.pop(0) if rest else "")):
                raise ConfigError(
                    "--config",
                    name,
                    "needs a recipe file",
                    "Write --config configs/recipes/quickstart.yaml.",
                )
            recipe = Path(name)
        elif word.partition("=")[0] in flags:
            flag, given, value = word.partition("=")
            if not given and not rest:
                raise ConfigError(flag, "", "needs a value", "Write it after the flag.")
            overrides.append(f"{flags[flag]}={value if given else rest.pop(0)}")
        elif word.startswith("-"):
            allowed = "--config FILE, or key.sub=value without dashes" + (
                f"; {verb} also has {', '.join(flags)}" if flags else ""
            )
            raise ConfigError("option", word, allowed, "Run megamask --help.")
        elif verb in ARGUMENTS and "=" not in word:
            if not arguments_left:
                raise ConfigError(
                    "argument",
                    word,
                    f"{verb} takes {' '.join(ARGUMENTS[verb])}, and key.sub=value",
                    "Leave it out.",
                )
            overrides.append(f"{arguments_left.pop(0)}={json.dumps(word)}")  # quoted, for YAML
        else:
            overrides.append(word)
    return verb, recipe, overrides


def _talk() -> None:
    """What verbs log goes to the terminal, from the main process; Megatron's remarks on optional
    packages do not.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.")
    handler = (
        logging.StreamHandler() if os.environ.get("RANK", "0") == "0" else logging.NullHandler()
    )
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger("megamask").addHandler(handler)
    logging.getLogger("megamask").setLevel(logging.INFO)


def _help() -> str:
    lines = [
        "usage: megamask VERB [--config FILE] [key.sub=value ...]",
        "",
        *(f"  {verb:<9} {what}" for verb, (_, what) in VERBS.items()),
    ]
    lines.append("")
    for verb in dict.fromkeys([*ARGUMENTS, *FLAGS]):
        lines.append(
            " ".join(
                [
                    "megamask",
                    verb,
                    *ARGUMENTS.get(verb, {}),
                    *(f"[{flag} …]" for flag in FLAGS.get(verb, {})),
                ]
            )
        )
    return "\n".join(
        [
            *lines,
            "",
            "Settings and their defaults: megamask/config/tree.py. Recipes: configs/recipes/.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
