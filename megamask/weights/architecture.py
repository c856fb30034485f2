"""From a Hugging Face folder's config.json to an Architecture."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megamask.errors import ArtifactError, ConfigError
from megamask.storage import read_json
from megamask.weights.composite_config import text_section
from megamask.weights.config_keys import ConfigKeys
from megamask.weights.families.registry import FAMILIES
from megamask.weights.family import Architecture

__all__ = ["Architecture", "parsed_architecture", "read_architecture"]


MISSING = (
    "Point model.hf at a Hugging Face model folder, run the verb gguf to make one, or name a "
    "Megatron checkpoint by model.megatron."
)


def read_architecture(
    hf_dir: Path, ignore_keys: Collection[str] = (), fix: str = MISSING
) -> Architecture:
    """Read the architecture of a model.

    Args:
        hf_dir: a Hugging Face folder, or the path of its config.json. Both the keys of
            transformers 4 and those of transformers 5 are known.
        ignore_keys: unknown keys that the user lets through (``model.ignore_keys``).
        fix: what makes the folder, for the message.

    Raises:
        ArtifactError: config.json is missing or is not JSON.
        ConfigError: the family is not supported, or a key asks for a feature that is not built.
    """
    path = hf_dir if hf_dir.suffix == ".json" else hf_dir / "config.json"
    config = read_json(path, fix)
    if not isinstance(config, dict):
        raise ArtifactError(path, "is not a JSON object", "Copy it again from the model's source.")
    return parsed_architecture(config, path, ignore_keys)


def parsed_architecture(
    config: Mapping[str, Any], path: Path, ignore_keys: Collection[str] = ()
) -> Architecture:
    """The architecture of a parsed config.json.

    Args:
        config: the content of the file.
        path: the file, for messages.
        ignore_keys: unknown keys that the user lets through.

    Raises:
        ConfigError: the family is not supported, or a key asks for a feature that is not built.
    """
    name = config.get("model_type", "")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        known = ", ".join(FAMILIES)
        raise ConfigError(
            "config.json: model_type",
            config.get("model_type"),
            f"one of {known}",
            "Point model.hf at a model of such a family.",
        )
    if family.composite is None:
        return ConfigKeys(config, path, name, family, ignore_keys).architecture()
    text = text_section(config, path, name, family, ignore_keys)
    place = f"{family.composite.section}."
    return ConfigKeys(text, path, name, family, ignore_keys, place).architecture()
