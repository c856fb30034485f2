"""What a file really is, for the message when it is not what it should be.

Interrupted downloads, `git clone` without Git LFS, login pages and archives all end up under the
name of a weight or mask file. Each has an own remedy, so the error names what was found.
"""

from __future__ import annotations

import json
import os
import re
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path

from megamask.errors import ArtifactError, printable
from megamask.machine_errors import reading

SAFETENSORS = "a safetensors file"
JSON = "a JSON text"
GGUF = "a GGUF file"
USABLE = "text without NUL, of characters that the system can encode"
DOWNLOAD = "Download the file again."
_HEADER_LIMIT = 10**8  # bytes; the safetensors library refuses longer headers


@dataclass(frozen=True)
class FileKind:
    """What was found at a path.

    Attributes:
        what: a noun for the message, as "an HTML page".
        fix: the action that helps; empty where the kind alone suggests none.
        is_torn: whether the file is what it should be, but cut or damaged.
    """

    what: str
    fix: str = ""
    is_torn: bool = False


_LFS = FileKind(
    "a Git LFS pointer of a few lines, not the file itself",
    "Run git lfs pull in the folder of the clone, or download the file.",
)
_HTML = FileKind(
    "an HTML page, such as a login or error page that was saved in its place", DOWNLOAD
)
_PICKLE = FileKind(
    "a PyTorch pickle, as .bin, .pt and .pth files are",
    "Of pickles, which can run code, megamask reads pytorch_model.bin and, in import, masks of "
    "other tools, and only their tensors: save a model with save_pretrained, which writes "
    ".safetensors files.",
)
_STARTS: tuple[tuple[bytes, FileKind], ...] = (
    (b"version https://git-lfs.github.com/spec/", _LFS),
    (b"GGUF", FileKind(GGUF, "Run the verb gguf, which unpacks it into a folder.")),
    (b"\x93NUMPY", FileKind("a NumPy array (.npy)")),
    (b"\x89HDF", FileKind("an HDF5 file")),
    (b"\x1f\x8b", FileKind("a gzip archive", "Unpack it first.")),
    (b"BZh", FileKind("a bzip2 archive", "Unpack it first.")),
    (b"\xfd7zXZ", FileKind("an xz archive", "Unpack it first.")),
    (b"\x28\xb5\x2f\xfd", FileKind("a Zstandard archive", "Unpack it first.")),
    (b"7z\xbc\xaf", FileKind("a 7-Zip archive", "Unpack it first.")),
    (b"PAR1", FileKind("a Parquet file")),
    (b"%PDF", FileKind("a PDF document")),
)
_SPECIAL = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def file_kind(path: Path) -> FileKind | None:
    """What ``path`` is, from its first bytes; None if there is nothing at the path.

    Reads at most the header of a safetensors file. A FIFO or a device is not opened.

    Raises:
        OSError: the path cannot be looked at or read.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            return FileKind(f"a link to {os.readlink(path)}, which does not exist")
        return None
    if stat.S_ISDIR(mode):
        return FileKind("a folder")
    for is_special, name in _SPECIAL:
        if is_special(mode):
            return FileKind(f"{name}, which is not read", "Name a regular file.")
    size = path.stat().st_size
    if size == 0:
        return FileKind("an empty file of 0 bytes", "Copy or download the file again.")
    with path.open("rb") as file:
        start = file.read(512)
    return _of_bytes(path, start, size)


def _of_bytes(path: Path, start: bytes, size: int) -> FileKind:
    for magic, kind in _STARTS:
        if start.startswith(magic):
            return kind
    if start.startswith(b"PK\x03\x04"):
        return _of_zip(path)
    if start[257:262] == b"ustar":
        return FileKind("a tar archive", "Unpack it first.")
    if len(start) > 1 and start[0] == 0x80 and start[1] in range(2, 6):
        return _PICKLE
    if size > 8 and start[8:9] == b"{" and _looks_like_a_length(start):
        return _of_safetensors(path, start, size)
    return _of_text(start)


def _of_zip(path: Path) -> FileKind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return FileKind("a torn zip archive", DOWNLOAD)
    if any(name.endswith("data.pkl") for name in names):
        return _PICKLE
    if names and all(name.endswith(".npy") for name in names):
        return FileKind("a NumPy archive (.npz)")
    return FileKind("a zip archive", "Unpack it first.")


def _looks_like_a_length(start: bytes) -> bool:
    return 0 < int.from_bytes(start[:8], "little") <= _HEADER_LIMIT


def _of_safetensors(path: Path, start: bytes, size: int) -> FileKind:
    length = int.from_bytes(start[:8], "little")
    again = "Copy or download the file again."
    if size < 8 + length:
        what = f"{SAFETENSORS} that ends within its header, after {size:,} bytes"
        return FileKind(what, again, is_torn=True)
    with path.open("rb") as file:
        file.seek(8)
        text = file.read(length)
    try:
        entries = {key: value for key, value in json.loads(text).items() if key != "__metadata__"}
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return FileKind(f"{SAFETENSORS} with a damaged header", again, is_torn=True)
    whole = 8 + length + end
    if size != whole:
        what = f"{SAFETENSORS} of {size:,} bytes, while its header describes {whole:,}"
        return FileKind(what, again, is_torn=True)
    return FileKind(SAFETENSORS)


def _of_text(start: bytes) -> FileKind:
    bare = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if re.match(rb"<(!doctype html|html|head|body)", bare, re.IGNORECASE):
        return _HTML
    if bare.startswith((b"<?xml", b"<Error")):
        return FileKind("an XML text, such as the error of a download", DOWNLOAD)
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as error:
        # The last letter may be cut by the end of what was read.
        text = start[: error.start].decode("utf-8") if error.start > len(start) - 4 else ""
    if not text or any(not letter.isprintable() and letter not in "\t\r\n\f" for letter in text):
        return FileKind("a file of no known format")
    if bare[:1] in (b"{", b"["):
        return FileKind(JSON)
    first = printable(text.strip().splitlines()[0][:40]) if text.strip() else ""
    return FileKind(f"a text that begins with {first!r}" if first else "a text of blanks")


def wrong_file(path: Path, wanted: str, fix: str, reason: object = "") -> ArtifactError:
    """The error for a path that cannot be read as what it should be.

    Args:
        path: the path.
        wanted: a noun for what is read, as "a mask file".
        fix: the action of the user where the kind of the file suggests none.
        reason: what a reader said, for a file that looks like what is wanted.
    """
    try:
        kind = file_kind(path)
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or str(error)
        unread = ArtifactError(path, f"cannot be read as {wanted} ({said})", fix)
        unread.__cause__ = error
        return unread
    if kind is None:
        return ArtifactError(path, "is missing", fix)
    said = f" ({printable(str(reason).splitlines()[0][:200])})" if str(reason) else ""
    if kind.is_torn:
        return ArtifactError(path, f"is torn: it is {kind.what}{said}", f"{kind.fix} {fix}".strip())
    if kind.what == wanted or kind.what == SAFETENSORS:
        return ArtifactError(path, f"is torn or not {wanted}{said}", fix)
    return ArtifactError(path, f"is not {wanted}: it is {kind.what}", kind.fix or fix)


def require_file(path: Path, wanted: str, fix: str) -> None:
    """Check that ``path`` is a regular file with content, before a library opens it.

    Raises:
        ArtifactError: there is nothing at the path, or a folder, FIFO, device, or empty file.
    """
    try:
        is_regular = path.is_file() and path.stat().st_size > 0
    except (OSError, ValueError):
        is_regular = False
    if not is_regular:
        raise wrong_file(path, wanted, fix)


def read_text(path: Path, fix: str) -> str:
    """The text of a regular file, which may be empty; bytes that are no text are replaced.

    Raises:
        ArtifactError: there is nothing at the path, or a folder, FIFO or device.
    """
    with reading(path, fix):
        if not path.is_file():
            raise wrong_file(path, "a text", fix)
        return path.read_text(encoding="utf-8", errors="replace")


def can_be_a_path(text: str) -> bool:
    """Whether the system can take ``text`` as a path: without NUL, and of characters that it can
    encode.
    """
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False
