"""The verb gguf: a GGUF file becomes a plain Hugging Face folder in bf16."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from megamask.config import Config, run_paths
from megamask.errors import ConfigError


def run(config: Config) -> None:
    """Unpack model.gguf into model.hf, unless the folder was made from the same file already.

    Raises:
        ConfigError: model.gguf is not set, or the package gguf is not installed.
        ArtifactError: the file is missing, or the folder holds something else.
    """
    if not config.model.gguf:
        raise ConfigError(
            "model.gguf",
            None,
            "a GGUF file",
            "Set model.gguf=FILE, or point model.hf at a Hugging Face folder.",
        )
    if find_spec("gguf") is None:
        problem = "needs the package gguf, which is not installed"
        fix = "Install it: pip install -c constraints.txt -e '.[gguf]'."
        raise ConfigError("model.gguf", config.model.gguf, problem, fix)
    from megamask.weights.from_gguf import unpack

    source, out = Path(config.model.gguf), run_paths(config).hf
    unpack(source, out)
