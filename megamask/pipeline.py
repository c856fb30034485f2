"""The questions that quickstart.sh asks between its stages: which stages are done, with which
settings, and how long each took.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from megamask import machine_errors
from megamask.config import Config, RunPaths, deciding, load_config, run_paths
from megamask.config.legacy import upgrade_note
from megamask.errors import EXIT_USER_ERROR, ConfigError, MegamaskError, printable
from megamask.process.lock import locked
from megamask.storage import read_json, read_object, write_json
from megamask.terminal import tell

READS = {
    "gguf": deciding.GGUF,
    "convert": deciding.CONVERT,
    "tokenize": deciding.TOKENIZE,
    "prune": deciding.PRUNE,
    "learn": deciding.LEARN,
    "export": deciding.EXPORT,
    "evaluate": deciding.EVALUATE,
}
# Cheap stages are made again where settings changed; a change to another stage is refused.
REMADE = ("export", "evaluate")


def artefacts(stage: str, config: Config, paths: RunPaths) -> list[Path]:
    """The paths whose presence says that a stage is done.

    The stage ``report`` has none and always runs, because it prints the table; ``prune`` without a
    method has none either and is left out.
    """
    return {
        "gguf": [paths.hf],
        "convert": [paths.weights],
        "tokenize": [paths.shards / name / "meta.json" for name in config.data.domains]
        or [paths.shards],
        "prune": [
            file
            for method in config.prune.methods
            for file in (paths.mask(method), paths.margins(method))
        ],
        "learn": [paths.mask("learned")],
        "export": [paths.export],
        "evaluate": [paths.results],
    }.get(stage, [])


def is_there(stage: str, config: Config, paths: RunPaths) -> bool:
    """Whether every artefact of the stage is there, whatever it was made with."""
    return stage != "report" and all(path.exists() for path in artefacts(stage, config, paths))


def is_done(stage: str, config: Config, paths: RunPaths) -> bool:
    """Whether every artefact of the stage is there.

    The artefacts of ``REMADE`` must also be as new as the learned mask, results as new as the
    one-shot masks too, and of these settings. The stage ``learn`` is not done where it goes on with
    other settings, as with more steps. It is done with fewer steps than were learned, because no
    step would read the number.
    """
    if not is_there(stage, config, paths):
        return False
    if stage == "learn":
        found = changes(stage, config, paths)
        before, now = found.pop("learn.steps", (0, 0))
        return not found and isinstance(before, int) and now <= before
    if stage not in REMADE:
        return True
    measured = config.prune.methods if stage == "evaluate" else []
    masks = [paths.mask(name) for name in ("learned", *measured)]
    made = artefacts(stage, config, paths)[0].stat().st_mtime
    newer_mask = any(mask.exists() and mask.stat().st_mtime > made for mask in masks)
    return not (newer_mask or changes(stage, config, paths))


def check(config: Config, paths: RunPaths) -> None:
    """Refuse to reuse artefacts that were made with other settings. The verb learn itself judges
    the settings that every step reads anew, and the content of its prior.

    Raises:
        ConfigError: naming the first setting that differs.
    """
    judged = {"learn": (*deciding.settings_of_role("each step"), "learn.prior.mask")}
    for stage in READS:
        if stage not in REMADE and is_there(stage, config, paths):
            for key, (before, now) in changes(stage, config, paths).items():
                if key in judged.get(stage, ()):
                    continue
                other = "RUN_DIR=runs/other ./launch/quickstart.sh ..."
                fix = f"Start afresh in another folder: {other}"
                raise ConfigError(
                    key, now, f"{stage} in {paths.run_dir} was made with {before!r}", fix
                )


def changes(stage: str, config: Config, paths: RunPaths) -> dict[str, tuple[Any, Any]]:
    """The settings that decide the stage's artefacts and differ from those it was made with. A path
    that has the same content as the former path does not differ.

    Returns:
        key -> (value that the finished stage was made with, value now).
    """
    before = _read(paths.run_dir / "quickstart.json").get(stage)
    if before is None:
        return {}
    found = deciding.changes(upgrade_note(before), config, READS[stage])
    paths_of_content = deciding.settings_of_role("content")
    found = {
        key: values
        for key, values in found.items()
        if key not in paths_of_content or not _has_same_content(key, config, paths)
    }
    if stage != "learn" or not found:
        return found
    # Importing the room learn takes seconds, so it waits until a setting differs.
    from megamask.learn.preflight import learning_changes

    counted = learning_changes(upgrade_note(before), config)
    return {key: values for key, values in found.items() if key in counted}


def _has_same_content(key: str, config: Config, paths: RunPaths) -> bool:
    """Whether the path of a setting has the content that the run was made from: the fingerprint of
    the converted weights, the digest of the unpacked file, the tokenizer of the shards.
    """
    # These modules import torch or transformers, so they wait until a path differs.
    from megamask.data.shards import read_shards
    from megamask.data.tokenizer import load_tokenizer
    from megamask.safe_checkpoint import NOTE
    from megamask.weights.base_model import base_model
    from megamask.weights.gguf_layout import GGUF_STAMP
    from megamask.weights.model_identity import difference

    try:
        if key in ("model.hf", "model.megatron"):
            note = read_object(paths.weights / NOTE, "", {"fingerprint": str})
            return not difference(note, base_model(config))
        if key == "model.gguf" and config.model.gguf:
            base_model(config).check_gguf()
            return (paths.hf / GGUF_STAMP).is_file() and Path(config.model.gguf).is_file()
        if key == "data.tokenizer":
            found = load_tokenizer(config).fingerprint
            domains = [read_shards(paths.shards / name) for name in config.data.domains]
            return all(one.meta["tokenizer"]["fingerprint"] == found for one in domains)
    except (MegamaskError, OSError):
        pass  # what is missing or torn is no known content
    return False


def record(stage: str, seconds: float, code: int, config: Config, paths: RunPaths) -> None:
    """Add the seconds of a stage to stages.json and, if it ended well, its settings to
    quickstart.json.

    The seconds of interrupted attempts count towards the attempt that ends.
    """
    file, settings = (paths.run_dir / f"{name}.json" for name in ("stages", "quickstart"))
    with locked("quickstart.sh", [file]):
        known = _read(file)
        unfinished = f"{stage} (unfinished)"
        total = known.pop(unfinished, 0) + seconds
        write_json(file, {**known, (unfinished if code else stage): total})
        if not code and stage in READS:
            made_with = deciding.deciding_settings(config, READS[stage])
            write_json(settings, {**_read(settings), stage: made_with})


def print_outputs(paths: RunPaths) -> None:
    """Print the paths of the files that a user wants next."""
    named = {
        "learned mask": paths.mask("learned"),
        "masked model": paths.export,
        "numbers": paths.results,
    }
    reports = sorted(paths.run_dir.rglob("report.html"))
    for name, path in {**named, **({"report": reports[0]} if reports else {})}.items():
        tell(f"{name:<13} {path}")


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(path, "Delete it.") if path.exists() else {}
    return found


def main() -> int:
    """The command line: ``check|is-done|record|outputs [STAGE [SECONDS CODE]] --config RECIPE
    key=value ...``.

    Returns:
        EXIT_OK (for ``is-done``: the stage is done), 1 (it is not), or EXIT_USER_ERROR.
    """
    split = sys.argv.index("--config")
    command, *rest = sys.argv[1:split]
    try:
        config = load_config(Path(sys.argv[split + 1]), sys.argv[split + 2 :])
        paths = run_paths(config)
        if command == "is-done":
            return 0 if is_done(rest[0], config, paths) else 1
        if command == "check":
            check(config, paths)
        elif command == "record":
            record(rest[0], float(rest[1]), int(rest[2]), config, paths)
        else:
            print_outputs(paths)
    except Exception as error:
        told = error if isinstance(error, MegamaskError) else machine_errors.explained(error)
        if told is None:
            raise
        print(f"quickstart: error: {printable(str(told))}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
