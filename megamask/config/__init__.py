"""Settings: the tree, its presets, how it is read, and where a run keeps its artefacts."""

from megamask.config.load import build_config, load_config
from megamask.config.paths import RunPaths, run_paths
from megamask.config.tree import Config, CorpusSection

__all__ = ["Config", "CorpusSection", "RunPaths", "build_config", "load_config", "run_paths"]
