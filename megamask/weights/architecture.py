"""From a Hugging Face folder's config.json to an Architecture."""

from __future__ import annotations

from pathlib import Path

from megamask.errors import ArtifactError, ConfigError
from megamask.storage import read_json
from megamask.weights.families import FAMILIES
from megamask.weights.family import Architecture

__all__ = ["Architecture", "read_architecture"]


def read_architecture(hf_dir: Path) -> Architecture:
    """Read ``hf_dir``/config.json (or the .json file itself), in the spelling of transformers 4 or
    5.

    Raises:
        ArtifactError: no config.json, or not JSON.
        ConfigError: another family, or a feature that is not built, named by its key.
    """
    path = hf_dir if hf_dir.suffix == ".json" else hf_dir / "config.json"
    config = read_json(
        path, "Point model.hf at a Hugging Face model folder, or run the verb gguf to make one."
    )
    if not isinstance(config, dict):
        raise ArtifactError(path, "is not a JSON object", "Copy it again from the model's source.")
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        known = ", ".join(FAMILIES)
        raise ConfigError(
            "config.json: model_type",
            config.get("model_type"),
            f"one of {known}",
            "Point model.hf at a model of such a family.",
        )
    return family.read(config, path)
