"""Reading a distributed checkpoint without running what a stranger put into it.

Megatron-Core and PyTorch unpickle the file ``.metadata`` of a checkpoint folder. A pickle can name
any function of any module and have it called, so a snapshot from somebody else could run code.
Every reader of this package therefore opens ``.metadata`` here first: the unpickler of this module
admits the classes that a checkpoint of plain tensors needs, and nothing else; those of old
Megatron-Core become PyTorch's, and nothing of Megatron is imported. It fills new objects with
attributes alone, never a class, which the whole process has. A checkpoint that holds other
objects than tensors is refused as well, because PyTorch unpickles such objects freely.
"""

from __future__ import annotations

import importlib
import io
import pickle
import zipfile
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

from megamask.errors import ArtifactError
from megamask.file_kinds import wrong_file
from megamask.machine_errors import PERMISSION, refused

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

INDEX = ".metadata"
COMMON = "common.pt"
COMMON_STATE = "common_state/"  # beginning of the name of the object that took its place
COMMON_BYTES = 2**26  # longer arguments are not read
NOTE = "megamask.json"  # the facts that this package keeps in the folder, beside the tensors
ADVICE = "Use a checkpoint that megamask wrote, from somebody you trust."

# The classes and functions that the index of a checkpoint of plain tensors names
# (torch 2.6 to 2.13).
ADMITTED: dict[str, frozenset[str]] = {
    "collections": frozenset({"OrderedDict"}),
    "pathlib": frozenset({"PosixPath", "PurePosixPath"}),
    "pathlib._local": frozenset({"PosixPath", "PurePosixPath"}),  # Python 3.13
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo", "_StoragePrefix"}),
    "torch.distributed.checkpoint.metadata": frozenset(
        {
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex",
            "StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        }
    ),
    "torch.distributed.checkpoint.planner": frozenset(
        {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"}
    ),
    "torch.serialization": frozenset({"_get_layout"}),
}  # fmt: skip
# Classes of older Megatron-Core, which added fields to those of PyTorch: module and name -> module
# and name of PyTorch's. Version 0.16.1 has empty classes of these names, to read old checkpoints.
OLD_CORE = "megatron.core.dist_checkpointing.strategies.torch"
PLAIN_CLASS = {
    (OLD_CORE, "MCoreMetadata"): ("torch.distributed.checkpoint.metadata", "Metadata"),
    (OLD_CORE, "MCoreSavePlan"): ("torch.distributed.checkpoint.planner", "SavePlan"),
}


def _admitted(module: str, name: str) -> Any:
    """The class or function of that name.

    Raises:
        UnpicklingError: the name is not admitted; nothing of it has been imported or called.
    """
    import torch

    module, name = PLAIN_CLASS.get((module, name), (module, name))
    if module == "torch" and (
        name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)
    ):
        return getattr(torch, name)
    if name in ADMITTED.get(module, ()):
        return getattr(importlib.import_module(module), name)
    raise pickle.UnpicklingError(f"it names {module}.{name}, which no tensor needs")


class _TensorsOnly(pickle.Unpickler):
    """The parser that PyTorch uses, which knows the admitted names alone: ``torch.Size``, the
    dtypes of tensors and ``ADMITTED``.
    """

    def find_class(self, module: str, name: str) -> Any:
        return _admitted(module, name)


_PARSERS: dict[int, Any] = dict(pickle._Unpickler.dispatch)  # the first byte of an opcode -> method


class _NewObjectsOnly(pickle._Unpickler):
    """A parser that also looks at what a pickle fills with attributes.

    The classes, functions, dtypes and members of enumerations that a pickle names are those of the
    whole process: an attribute of one would change every later path or tensor. Only the parser in
    Python lets a subclass look.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(_PARSERS)
    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        return _admitted(module, name)

    def _build(self) -> None:
        filled = self.stack[-2]
        if isinstance(filled, type) or not is_dataclass(filled):
            raise pickle.UnpicklingError(f"it sets attributes of {filled!r:.100}")
        _PARSERS[pickle.BUILD[0]](self)

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it holds what no tensor needs")

    dispatch[pickle.BUILD[0]] = _build
    # objects that the process registered, and a length whose memory is taken before it is checked
    dispatch |= dict.fromkeys(
        (code[0] for code in (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.BYTEARRAY8)), _refuse
    )


def read_index(folder: Path, fix: str = ADVICE, with_objects: bool = False) -> Metadata:
    """Read the index of the checkpoint in ``folder`` and check that its tensors can be read safely.

    Args:
        folder: a folder that ``dist_checkpointing.save`` wrote.
        fix: what the user can do if the checkpoint is torn.
        with_objects: whether the checkpoint may hold other objects beside its tensors. Only a
            caller that never has them read may say so, because PyTorch unpickles them freely.

    Raises:
        ArtifactError: the index is missing, torn or names anything but tensors, or a stored piece
            lies outside its file or outside the folder.
    """
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        Metadata,
        TensorStorageMetadata,
    )

    path = folder / INDEX
    _refuse_pipe(path, fix)
    try:
        data = path.read_bytes()
        _NewObjectsOnly(io.BytesIO(data)).load()
        index = _TensorsOnly(io.BytesIO(data)).load()
    except OSError as error:
        raise _torn(folder, f"{INDEX}: {error.strerror}", fix) from error
    except Exception as error:  # a torn pickle raises whatever its bytes happen to ask for
        raise _torn(folder, f"{INDEX}: {type(error).__name__}: {error}", fix) from error
    entries = getattr(index, "state_dict_metadata", None)
    if not isinstance(index, Metadata) or not isinstance(entries, dict):
        raise _torn(folder, f"{INDEX} holds a {type(index).__name__}", fix)
    for key, entry in entries.items():
        if with_objects and isinstance(key, str) and isinstance(entry, BytesStorageMetadata):
            continue
        if not isinstance(entry, TensorStorageMetadata):
            problem = f"holds {key}, which is no tensor ({type(entry).__name__})"
            raise ArtifactError(folder, problem, ADVICE)
        if not isinstance(key, str) or not _is_described(entry):
            raise _torn(folder, f"{INDEX} does not describe {key!r}", fix)
    _check_pieces(folder, index, fix)
    return index


def settle_index(folder: Path) -> None:
    """Write the index of a checkpoint that was just made anew, so that equal checkpoints have equal
    bytes.

    PyTorch notes the folder and a random number of the save, which no reader uses, and lists the
    pieces in the order in which the writers came to their turn.
    """
    path = folder / INDEX
    index = _TensorsOnly(io.BytesIO(path.read_bytes())).load()
    index.storage_meta = None
    index.state_dict_metadata = dict(sorted(index.state_dict_metadata.items()))
    pieces = index.storage_data.items()
    index.storage_data = dict(sorted(pieces, key=lambda piece: (piece[0].fqn, str(piece[0]))))
    with path.open("wb") as file:
        pickler = pickle.Pickler(file, protocol=4)
        pickler.fast = True  # no reference to an equal object before, which may be the same or not
        pickler.dump(index)


def check_common(folder: Path, fix: str = ADVICE) -> None:
    """Check that ``common.pt``, which holds what is no tensor, has plain numbers and texts alone.

    Raises:
        ArtifactError: the file is missing, torn or names other classes.
    """
    import torch

    _refuse_pipe(folder / COMMON, fix)
    try:
        torch.load(folder / COMMON, map_location="cpu", weights_only=True)
    except Exception as error:  # a missing file, a torn archive, a class that is not admitted
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise _torn(folder, f"{COMMON}: {reason}", fix) from error


@dataclass
class _Inert:
    """In the place of every object that a file names: nothing of the file's choice is imported or
    called. Attributes are kept, and contents are dropped.
    """

    def __new__(cls, *_: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Drop an item of a list."""

    def extend(self, items: Any) -> None:
        """Drop items of a list."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class _Names(_NewObjectsOnly):
    """A parser for which every class and every function is ``_Inert``, and every tensor None."""

    def find_class(self, module: str, name: str) -> Any:
        return _Inert

    def persistent_load(self, pid: Any) -> None:
        return None


def told_args(folder: Path) -> dict[str, Any]:
    """The arguments of Megatron-LM that a checkpoint holds under ``args``: in ``common.pt``, or,
    from Megatron-Core 0.19 on, in an object among the tensors. Empty where there are none, or they
    cannot be read without running anything. Objects of other classes are values without a meaning.
    """
    try:
        with zipfile.ZipFile(_common_state(folder)) as archive:
            name = next(one for one in archive.namelist() if one.endswith("/data.pkl"))
            if archive.getinfo(name).file_size > COMMON_BYTES:
                return {}
            held = _Names(io.BytesIO(archive.read(name))).load()
        held = held[0] if isinstance(held, list) else held  # an object is one of several shards
        args = held.get("args") if isinstance(held, dict) else None
        return dict(vars(args)) if isinstance(args, _Inert) else {}
    except Exception:  # a torn file raises whatever its bytes happen to ask for
        return {}


def _common_state(folder: Path) -> Path | BinaryIO:
    """What ``torch.save`` wrote of all that is no tensor."""
    if (folder / COMMON).exists():
        return folder / COMMON
    stored = read_index(folder, with_objects=True).storage_data.items()
    piece = next(piece for place, piece in stored if place.fqn.startswith(COMMON_STATE))
    if piece.length > COMMON_BYTES:
        raise ValueError(f"{COMMON_STATE} is longer than any arguments")
    with (folder / piece.relative_path).open("rb") as file:
        file.seek(piece.offset)
        return io.BytesIO(file.read(piece.length))


def _refuse_pipe(path: Path, fix: str) -> None:
    """Refuse what a reader would wait for."""
    if path.exists() and not path.is_file():
        raise wrong_file(path, "a part of a checkpoint", fix)


def _is_described(entry: Any) -> bool:
    """Whether an entry says the shape and the dtype of a tensor and of each of its chunks."""
    import torch

    def is_shape(size: object) -> bool:
        return isinstance(size, torch.Size) and all(number >= 0 for number in size)

    try:
        chunks = [(chunk.sizes, chunk.offsets) for chunk in entry.chunks]
        return (
            is_shape(entry.size)
            and isinstance(entry.properties.dtype, torch.dtype)
            and all(is_shape(sizes) and is_shape(offsets) for sizes, offsets in chunks)
        )
    except (AttributeError, TypeError):
        return False


def _check_pieces(folder: Path, index: Metadata, fix: str) -> None:
    """Check that every stored piece lies within a file of the folder: a cut file shows unread."""
    sizes: dict[str, int] = {}
    try:
        pieces = [
            (str(piece.relative_path), int(piece.offset), int(piece.length))
            for piece in index.storage_data.values()
        ]
    except (AttributeError, TypeError, ValueError) as error:
        raise _torn(folder, f"{INDEX}: {error}", fix) from error
    for name, offset, length in pieces:
        if name != Path(name).name or (folder / name).is_symlink():
            raise ArtifactError(folder, f"keeps a piece in {name!r}, outside the folder", ADVICE)
        _refuse_pipe(folder / name, fix)
        try:
            size = sizes.setdefault(name, (folder / name).stat().st_size)
        except (OSError, ValueError) as error:  # a zero byte in a name is a ValueError
            raise _torn(folder, f"{name}: {error}", fix) from error
        if offset < 0 or length < 0 or size < offset + length:
            problem = f"{name} has {size} bytes, at least {offset + length} were written"
            raise _torn(folder, problem, fix)


def unreadable(folder: Path, error: BaseException, fix: str) -> ArtifactError:
    """The error of a checkpoint whose tensors the library could not read."""
    if told := refused(error):
        return ArtifactError(folder, f"cannot be read ({told})", PERMISSION)
    return ArtifactError(folder, f"cannot be read ({reason_of(error)})", fix)


def reason_of(error: BaseException) -> str:
    """The kind and the first sentence of an error that the library raised.

    Its CheckpointException only wraps the errors of the ranks, so the first of these is told.
    """
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    first = (str(error).splitlines() or [""])[0].partition(". ")[0]  # the rest advises programmers
    return f"{type(error).__name__}: {first[:200]}"


def _torn(folder: Path, reason: str, fix: str) -> ArtifactError:
    return ArtifactError(folder, f"is torn or no checkpoint ({reason[:300]})", fix)
