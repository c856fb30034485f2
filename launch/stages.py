"""What quickstart.sh asks between the stages: what is done already, with which settings, and how long each stage took."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from megamask.config import Config, RunPaths, load_config, run_paths
from megamask.errors import EXIT_USER_ERROR, ConfigError, MegamaskError
from megamask.storage import read_json, write_json

# Settings that may change between two runs of one folder: none of them changes an artefact that is reused.
FREE = ("run_dir", "device", "parallel", "evaluate", "export.out", "learn.resume", "learn.snapshot", "learn.monitor")


def artefacts(stage: str, config: Config, paths: RunPaths) -> list[Path]:
    """The paths whose presence says that a stage is done. ``report`` is always made anew: it prints the table."""
    return {
        "gguf": [paths.hf],
        "convert": [paths.weights],
        "tokenize": [paths.shards],
        "prune": [paths.mask(method) for method in config.prune.methods],
        "learn": [paths.mask("learned")],
        "export": [paths.export],
        "evaluate": [paths.results],
    }.get(stage, [])


def is_done(stage: str, config: Config, paths: RunPaths) -> bool:
    """Whether every artefact is there, and not older than the learned mask where it was made from it."""
    found = artefacts(stage, config, paths)
    if not found or not all(path.exists() for path in found):
        return False
    learned = paths.mask("learned")
    made_from_mask = stage in ("export", "evaluate")
    return not (made_from_mask and learned.exists() and learned.stat().st_mtime > found[0].stat().st_mtime)


def check(config: Config, paths: RunPaths) -> None:
    """Refuse a folder that was made with other settings; evaluate again if only the protocol changed.

    Raises:
        ConfigError: naming the first setting that differs.
    """
    file = paths.run_dir / "quickstart.json"
    now = _flat(config.model_dump(mode="json"), paths.run_dir)
    before = read_json(file, "Delete it.") if file.exists() else now
    changed = sorted(key for key in now.keys() | before.keys() if now.get(key) != before.get(key))
    for key in changed:
        if not any(key == free or key.startswith(f"{free}.") for free in FREE):
            made_with = f"{paths.run_dir} was made with {before.get(key)!r}"
            raise ConfigError(key, now.get(key), made_with, "Start afresh in another folder: RUN_DIR=runs/other ./launch/quickstart.sh ...")
    if paths.results.exists() and any(key.startswith("evaluate.") for key in changed):
        paths.results.replace(paths.results.with_name("results.previous.json"))
    write_json(file, now)


def record(stage: str, seconds: float, code: int, paths: RunPaths) -> None:
    """Put the seconds of a stage beside those of the others in stages.json; interrupted attempts count towards the one that ends."""
    file = paths.run_dir / "stages.json"
    known: dict[str, float] = read_json(file, "Delete it.") if file.exists() else {}
    unfinished = f"{stage} (unfinished)"
    total = known.pop(unfinished, 0) + seconds
    write_json(file, {**known, (unfinished if code else stage): total})


def print_outputs(paths: RunPaths) -> None:
    """Name the files a user wants next."""
    named = {"learned mask": paths.mask("learned"), "masked model": paths.export, "numbers": paths.results}
    reports = sorted(paths.run_dir.rglob("report.html"))
    for name, path in {**named, **({"report": reports[0]} if reports else {})}.items():
        print(f"{name:<13} {path}")


def _flat(tree: dict[str, Any], run_dir: Path, prefix: str = "") -> dict[str, Any]:
    """Dotted keys; paths below the run folder are kept relative to it, so that the folder can be moved."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, run_dir, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value.replace(str(run_dir), "{run_dir}") if isinstance(value, str) else value
    return flat


def main() -> int:
    """``stages.py check|is-done|record|outputs [STAGE [SECONDS CODE]] --config RECIPE key=value ...``"""
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
            record(rest[0], float(rest[1]), int(rest[2]), paths)
        else:
            print_outputs(paths)
    except MegamaskError as error:
        print(f"quickstart: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
