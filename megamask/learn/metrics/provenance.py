"""What a run was made with: the resolved settings and the versions of everything under it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from pathlib import Path

import torch

import megamask
from megamask.config import Config, load_config
from megamask.config.changed import Changed, write_changes
from megamask.config.yaml_text import write_yaml
from megamask.shipped import source_commit
from megamask.storage import write_json, write_text

ABSENT = "absent"
# distribution -> a module that only the right package has (the "apex" on PyPI is something else)
_OPTIONAL = {"transformer-engine": "transformer_engine", "apex": "apex.normalization"}
_PACKAGES = ("megatron-core", "transformers", "numba", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """Versions of Python, the packages and the code, and the names of the machine's parts; what is
    not there is ``"absent"``.
    """
    own = getattr(megamask, "__version__", None) or _version("megamask")
    found = {
        "megamask": own,
        "git commit": source_commit() or ABSENT,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    found |= {name: _version(name) for name in _PACKAGES}
    found |= {
        name: _version(name) if _has_module(module) else ABSENT
        for name, module in _OPTIONAL.items()
    }
    return found | {"platform": platform.platform(), "cpu": _cpu_name(), "gpu": _gpu_name()}


def write_provenance(folder: Path, config: Config, changes: list[Changed]) -> None:
    """Write ``config.yaml`` (every setting; ``--config`` reads it back to the same settings),
    ``versions.json`` and, for a run whose settings changed, ``changes.json``.
    """
    path = folder / "config.yaml"
    write_text(path, write_yaml(config.model_dump(mode="json")))
    assert load_config(path) == config, "the written settings read back differently"
    write_json(folder / "versions.json", versions())
    (folder / "changes.json").unlink(missing_ok=True)  # of a run before, which this run replaces
    if changes:
        write_json(folder / "changes.json", write_changes(changes))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ABSENT


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except Exception:  # a parent package that breaks on import is as good as absent
        return False


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()


def _gpu_name() -> str:
    if not torch.cuda.is_available():
        return ABSENT
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
