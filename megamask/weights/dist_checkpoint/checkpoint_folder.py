"""Where the tensors of a Megatron checkpoint lie, and which of Megatron's formats a folder has.

Megatron-LM's ``--save`` folder holds ``iter_0000123`` or ``release``, and
``latest_checkpointed_iteration.txt`` names the last of them (``get_checkpoint_name`` and
``read_metadata`` in megatron/training/checkpointing.py). Megatron-Bridge writes the same beside a
tracker of its own, and NeMo 2 puts the tensors into a folder ``weights``. A folder of the format
``torch_dist`` has ``metadata.json`` with the key ``sharded_backend``, and PyTorch's index
``.metadata``. The formats before it are ``torch``, files ``mp_rank_00/model_optim_rng.pt`` that are
pickles of whole objects, and ``zarr``.
"""

from __future__ import annotations

from pathlib import Path

from megamask.errors import ArtifactError, ConfigError
from megamask.machine_errors import reading
from megamask.safe_checkpoint import COMMON, INDEX
from megamask.storage import read_object

TRACKER = "latest_checkpointed_iteration.txt"
BRIDGE_TRACKER = "latest_train_state.pt"  # of Megatron-Bridge, whose first versions had no other
RELEASE = "release"
FORMAT = "metadata.json"
BACKEND = "torch_dist"
WEIGHTS = "weights"
RUN_CONFIG = "run_config.yaml"  # the settings of Megatron-Bridge
# What a checkpoint leaves in a folder, by name or pattern; the tensors lie in the folder RELEASE.
FILES = (TRACKER, BRIDGE_TRACKER, RELEASE, FORMAT, RUN_CONFIG, "*.distcp", COMMON, INDEX)
KEY = "model.megatron"
FIX = f"Point {KEY} at a folder that Megatron wrote with --ckpt-format torch_dist."
CONVERT = (
    "Write it anew with Megatron-LM: load it, and add --ckpt-convert-format torch_dist "
    "--ckpt-convert-save FOLDER."
)


def find_checkpoint(path: Path) -> Path:
    """The folder with the index of a checkpoint.

    Args:
        path: that folder, the folder that holds it, or Megatron's ``--save`` folder, of which the
            last iteration is taken.

    Raises:
        ConfigError: nothing is there.
        ArtifactError: the folder holds no checkpoint, or a checkpoint of another format.
    """
    if not path.is_dir():
        raise ConfigError(KEY, str(path), "a folder with a Megatron checkpoint", "Correct it.")
    folder = path
    if (path / TRACKER).exists():
        folder = _last_iteration(path)
    elif (path / BRIDGE_TRACKER).exists():
        folder = path / f"iter_{_step(path / BRIDGE_TRACKER):07d}"
    if not (folder / INDEX).exists() and (folder / WEIGHTS).is_dir():
        folder = folder / WEIGHTS
    _refuse_other_formats(folder)
    return folder


def _last_iteration(path: Path) -> Path:
    """The folder that the tracker of a ``--save`` folder names."""
    with reading(path / TRACKER, FIX):
        text = (path / TRACKER).read_bytes()[:100].decode("utf-8", "replace").strip()
    if text == RELEASE:
        return path / RELEASE
    if not text.isascii() or not text.isdigit():
        problem = f"holds {text!r}, neither the number of an iteration nor {RELEASE}"
        raise ArtifactError(path / TRACKER, problem, FIX)
    return path / f"iter_{int(text):07d}"


def _step(path: Path) -> int:
    """The iteration in the tracker of Megatron-Bridge, a tensor among others."""
    import torch

    try:
        step = int(torch.load(path, map_location="cpu", weights_only=True)["step"])
    except Exception as error:  # a torn file raises whatever its bytes happen to ask for
        problem = f"holds no number of an iteration ({type(error).__name__})"
        raise ArtifactError(path, problem, FIX) from error
    return step


def _refuse_other_formats(folder: Path) -> None:
    if (folder / FORMAT).exists():
        backend = read_object(folder / FORMAT, FIX, {}).get("sharded_backend")
        if backend != BACKEND:
            problem = f"has the format {backend!r}; only {BACKEND} is read"
            raise ArtifactError(folder, problem, CONVERT)
    if (folder / INDEX).exists():
        return
    ranks = sorted(folder.glob("mp_rank_*")) if folder.is_dir() else []
    if ranks:
        problem = (
            f"has the format torch ({ranks[0].name}), pickles of whole objects; "
            f"only {BACKEND} is read"
        )
        raise ArtifactError(folder, problem, CONVERT)
    problem = f"holds no Megatron checkpoint: {INDEX} is missing"
    raise ArtifactError(folder, problem, FIX)
