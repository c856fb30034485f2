"""A file that is not what it should be is named for what it is, by every reader."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save

import megamask
from megamask.config import build_config
from megamask.errors import ArtifactError
from megamask.file_kinds import DOWNLOAD, file_kind, wrong_file
from megamask.storage import read_json
from megamask.verbs.gguf import run as gguf
from megamask.weights.hf_files import HFReader

WHOLE = save({"a": np.zeros(64)})
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 538090408\n"


def of_zip(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "/").replace("_", "."), data)
    return buffer.getvalue()


def of_torch(legacy: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(4)}, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def of_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.safetensors"), io.BytesIO())
    return buffer.getvalue()


def of_numpy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(4))
    return buffer.getvalue()


KINDS: dict[str, tuple[bytes, str, str]] = {  # content, what it is, a word of the fix
    "empty": (b"", "an empty file of 0 bytes", "again"),
    "lfs": (LFS, "a Git LFS pointer", "git lfs pull"),
    "html": (b"\n  <!doctype HTML>\n<html>Log in", "an HTML page", DOWNLOAD),
    "bare html": (b"<html><body>404", "an HTML page", DOWNLOAD),
    "s3 error": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "an XML text", DOWNLOAD),
    "torch": (of_torch(legacy=False), "a PyTorch pickle", "save_pretrained"),
    "old torch": (of_torch(legacy=True), "a PyTorch pickle", "save_pretrained"),
    "npz": (of_zip(a_npy=b""), "a NumPy archive", ""),
    "npy": (of_numpy(), "a NumPy array", ""),
    "zip": (of_zip(model_safetensors=b""), "a zip archive", "Unpack"),
    "torn zip": (of_torch(legacy=False)[:200], "a torn zip archive", DOWNLOAD),
    "gzip": (gzip.compress(WHOLE), "a gzip archive", "Unpack"),
    "tar": (of_tar(), "a tar archive", "Unpack"),
    "text": (b"hello there\n", "a text that begins with 'hello there'", ""),
    "escape codes": (b"\x1b[2Jgone", "a file of no known format", ""),
    "cut letter": ("ä".encode() * 400, "a text that begins with 'ää", ""),
    "zeros": (bytes(1000), "a file of no known format", ""),
    "cut": (WHOLE[:-100], "torn: it is a safetensors file of", "again"),
    "longer": (WHOLE + b"x", "torn: it is a safetensors file of", "again"),
    "cut in its header": (WHOLE[:20], "ends within its header, after 20 bytes", "again"),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_reader_names_the_kind(tmp_path: Path, name: str) -> None:
    content, what, fix = KINDS[name]
    hf = tmp_path / "hf"
    hf.mkdir()
    for file in ("mask.safetensors", "hf/model.safetensors", "note.json", "m.gguf"):
        (tmp_path / file).write_bytes(content)
    config = build_config({"model": {"gguf": str(tmp_path / "m.gguf"), "hf": str(tmp_path / "o")}})
    readers: list[Callable[[], object]] = [
        lambda: megamask.load_masks(tmp_path / "mask.safetensors"),
        lambda: megamask.verify(tmp_path / "mask.safetensors"),
        lambda: HFReader(hf),
        lambda: read_json(tmp_path / "note.json", "Make it again."),
        lambda: gguf(config),
    ]
    for read in readers:
        with pytest.raises(ArtifactError) as caught:
            read()
        assert what in str(caught.value) and fix in caught.value.fix, str(caught.value)


def test_a_whole_file_is_its_kind(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(WHOLE)
    kind = file_kind(tmp_path / "a")
    assert kind is not None and kind.what == "a safetensors file" and not kind.is_torn
    (tmp_path / "b").write_text(json.dumps({"a": [1]}))
    kind = file_kind(tmp_path / "b")
    assert kind is not None and kind.what == "a JSON text"


@pytest.mark.parametrize("name", ["fifo", "folder", "link", "none"])
def test_what_is_no_file_is_named_and_not_opened(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    make: dict[str, Callable[[], None]] = {
        "fifo": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "link": lambda: path.symlink_to(tmp_path / "gone"),
        "none": lambda: None,
    }
    make[name]()
    what = {
        "fifo": "it is a FIFO, which is not read",
        "folder": "it is a folder",
        "link": "it is a link to .*gone, which does not exist",
        "none": "is missing",
    }[name]
    with pytest.raises(ArtifactError, match=what):
        megamask.load_masks(path)
    with pytest.raises(ArtifactError, match=what):
        read_json(path, "Make it.")


def test_a_folder_of_pickles_or_parts_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(of_torch(legacy=False))
    with pytest.raises(ArtifactError, match=r"model\.pt.*PyTorch pickle.*save_pretrained"):
        HFReader(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(WHOLE)
    with pytest.raises(ArtifactError, match=r"and neither model\.safetensors nor .*index\.json"):
        HFReader(tmp_path)


def test_no_bytes_make_the_naming_fail(tmp_path: Path) -> None:
    choose = np.random.default_rng(0)
    starts = [WHOLE, of_torch(legacy=False), LFS, of_tar(), b"{", b""]
    for number in range(600):
        data = bytearray(starts[number % len(starts)])
        data += choose.bytes(int(choose.integers(0, 600)))
        for _ in range(int(choose.integers(0, 8))):
            if data:
                data[int(choose.integers(len(data)))] = int(choose.integers(256))
        (tmp_path / "x").write_bytes(data)
        message = str(wrong_file(tmp_path / "x", "a mask file", "Make it."))
        assert message.count("\n") == 0 and message.isprintable()
