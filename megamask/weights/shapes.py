"""Architectures of well-known models without weights.

They serve to plan and to benchmark a run before anything is downloaded. A shape without a published
config.json says under the key ``sources`` where each of its numbers comes from.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from megamask.errors import ConfigError
from megamask.weights.architecture import Architecture, read_architecture

FOLDER = Path(__file__).with_name("known")
SOURCES = "sources"
SHAPES = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


def read_shape(name: str, key: str = "--model", ignore_keys: Collection[str] = ()) -> Architecture:
    """The architecture of a named shape, or of a Hugging Face folder or config.json.

    Args:
        name: one of ``SHAPES``, or a path.
        key: the setting that chose the name, for messages.
        ignore_keys: see ``read_architecture``.

    Raises:
        ConfigError: the name is neither a shape nor a path.
        ArtifactError: the folder has no config.json.
    """
    if name in SHAPES:
        return read_architecture(FOLDER / f"{name}.json", (SOURCES,))
    if not Path(name).exists():
        raise ConfigError(
            key,
            name,
            f"one of {', '.join(SHAPES)}, or a Hugging Face folder",
            "Correct the name or the path.",
        )
    return read_architecture(Path(name), ignore_keys)
