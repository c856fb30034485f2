"""The files of a model beside its weights: config, tokenizer, templates, licence, code."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from megamask.errors import ArtifactError
from megamask.storage import file_sha256, real_path, write_json
from megamask.weights.dist_checkpoint import checkpoint_folder
from megamask.weights.token_ids import write_pieces

log = logging.getLogger(__name__)
# Files that are not copied beside new weights: weights of any format, what says where weights of
# Megatron lie and what they are, and notes of megamask.
NOT_COPIED = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx*"),
    *("*.ckpt", "*.npz", "*.ot", "*.tflite", "*.nemo", "*.pkl", "*.pickle"),
    *("*.index.json", "megamask_*.json"),
    *checkpoint_folder.FILES,
)
TOKENIZER = (
    *("tokenizer*", "vocab*", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("chat_template*", "*.model", "*.tiktoken", "spiece*"),
)
SIDE_FOLDERS = ("additional_chat_templates",)
# A folder without these is another model, or none.
NEEDED = ("config.json", "generation_config.json", *TOKENIZER)


def copy_side_files(
    source_dir: Path, folder: Path, config: Mapping[str, Any] | None = None
) -> None:
    """Copy everything but weights, and say in the log what is left out.

    Args:
        source_dir: the folder of the files.
        folder: where they go.
        config: the content of config.json, where ``source_dir`` has none; it may then be missing.

    Raises:
        ArtifactError: as ``check_side_files``.
    """
    if config is not None:
        write_json(folder / "config.json", config)
        if not source_dir.is_dir():
            return
    for file in _files(source_dir):
        place = folder / file.relative_to(source_dir)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, place)


def check_side_files(source_dir: Path) -> None:
    """Check that config and tokenizer of a folder, if it is there, can be copied.

    Raises:
        ArtifactError: one of them is a link to a place outside the model.
    """
    if source_dir.is_dir():
        _files(source_dir)


def add_tokenizer(folder: Path, tokenizer: Path | None, adds_bos: bool = False) -> bool:
    """Copy the tokenizer of another folder, or its one sentencepiece file, into a folder that has
    none; returns whether the folder has one now.
    """
    if not _tokenizer_of(folder):
        for file in _tokenizer_of(tokenizer):
            if file == tokenizer:
                write_pieces(file, folder, adds_bos)
            else:
                shutil.copyfile(file, folder / file.name)
    return bool(_tokenizer_of(folder))


def tokenizer_digests(tokenizer: Path | None) -> dict[str, str]:
    """Name -> SHA-256 of every file that ``add_tokenizer`` may copy."""
    return {file.name: file_sha256(file) for file in _tokenizer_of(tokenizer)}


def _tokenizer_of(place: Path | None) -> list[Path]:
    """The files of the tokenizer in a folder, or the one file."""
    if place is None or not place.is_dir():
        return [place] if place is not None and place.is_file() else []
    return [file for file in _files(place) if any(fnmatch(file.name, one) for one in TOKENIZER)]


def side_digests(source_dir: Path, config: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Name -> SHA-256 of every file that ``copy_side_files`` takes of these arguments."""
    found = {}
    if config is not None:
        found["config.json"] = hashlib.sha256(json.dumps(config).encode()).hexdigest()
    files = _files(source_dir) if source_dir.is_dir() else []
    return found | {file.relative_to(source_dir).as_posix(): file_sha256(file) for file in files}


def _files(source_dir: Path) -> list[Path]:
    found, left_out = [], []
    for path in sorted(source_dir.iterdir()):
        if path.name.startswith(".") or any(fnmatch(path.name, one) for one in NOT_COPIED):
            continue
        if path.is_dir() and path.name in SIDE_FOLDERS and not path.is_symlink():
            for file in sorted(path.iterdir()):
                if belongs(file, path, source_dir):
                    found.append(file)
                else:
                    left_out.append(f"{path.name}/{file.name}")
        elif belongs(path, source_dir):
            found.append(path)
        elif path.is_symlink() and any(fnmatch(path.name, one) for one in NEEDED):
            problem = f"is a link to {real_path(path)}, outside the model: it is not copied into a "
            fix = "Put the file itself there, for example with cp -L."
            raise ArtifactError(path, problem + "folder that may be published", fix)
        else:
            left_out.append(path.name)
    if left_out:
        reason = "folders, and links to places outside the model, are not copied"
        log.warning("left out %s of %s: %s", ", ".join(left_out), source_dir, reason)
    return found


def belongs(file: Path, folder: Path, model: Path | None = None) -> bool:
    """Whether a side file is a regular file of the model: in its folder, or among the blobs of the
    Hub cache that the folder, or ``model`` above it, is a snapshot of. A link to anywhere else
    could publish a private file.
    """
    top, target = real_path(model or folder), real_path(file)
    blobs = [top.parent.parent / "blobs"] if top.parent.name == "snapshots" else []
    return target.is_file() and target.parent in [real_path(folder), *blobs]
