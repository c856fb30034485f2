"""Megatron weights on disk, and their conversion from Hugging Face (HF) tensors.

The format is that of Megatron's dist_checkpointing: weights that one TP wrote can be read at any
other TP.
"""

from __future__ import annotations

import queue
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megamask import storage
from megamask.errors import ArtifactError, WriterError
from megamask.machine_errors import writing
from megamask.model.build import model_rules
from megamask.model.language_model import LanguageModel
from megamask.parallel.megatron_versions import request_save, results_go_through
from megamask.parallel.mesh import Mesh
from megamask.process.open_folder import OpenFolder
from megamask.process.signals import SIGNALS
from megamask.safe_checkpoint import (
    NOTE,
    check_common,
    read_index,
    reason_of,
    settle_index,
    unreadable,
)
from megamask.weights.architecture import Architecture
from megamask.weights.source import FINITE, WeightSource, not_finite

FIX = "Check the memory and the disk; the same command goes on from what is complete."
EXTRA_STATE = "_extra_state"  # end of the name of a module's extra state


def sharded_state(model: torch.nn.Module) -> dict[str, Any]:
    """The tensors of the model's sharded state dict, without the extra state of modules."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state: dict[str, Any] = model.sharded_state_dict(metadata=metadata)  # type: ignore[operator]
    return {key: value for key, value in state.items() if not key.endswith(EXTRA_STATE)}


def save_sharded(
    state: dict[str, Any], path: Path, mesh: Mesh, note: dict[str, Any], files: Sequence[Path] = ()
) -> None:
    """Save a sharded state, a JSON note and copies of ``files`` as the folder ``path``.

    The folder is written under a temporary name and renamed when it is complete. All ranks must
    call this function.

    Raises:
        ArtifactError: the disk is full, or ``path`` cannot be written.
    """

    def write(temporary: Path) -> None:
        with deaf_helpers(), results_go_through(queue.Queue):
            request_save(state, temporary).execute_sync()
        mesh.barrier()
        if mesh.is_main:
            settle_index(temporary)

    write_folder(path, mesh, note, files, write)


def write_folder(
    path: Path,
    mesh: Mesh,
    note: dict[str, Any],
    files: Sequence[Path],
    write: Callable[[Path], None],
) -> None:
    """Have all ranks write a checkpoint under a temporary name; add a JSON note and copies of
    ``files``, and rename the folder to ``path``. All ranks must call this function.

    Raises:
        ArtifactError: the disk is full, or ``path`` cannot be written.
    """
    target, temporary = storage.places(path)
    temporary = Path(mesh.from_main(str(temporary)))
    with telling(path, temporary):
        try:
            if mesh.is_main:
                temporary.mkdir(parents=True)
            mesh.barrier()
            write(temporary)
            if mesh.is_main:
                storage.write_json(temporary / NOTE, note)
                for file in files:
                    shutil.copy(file, temporary)
                storage.commit_dir(temporary, target)
        finally:
            if mesh.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
    mesh.barrier()


@contextmanager
def telling(path: Path, temporary: Path) -> Iterator[None]:
    """Tell every failure of Megatron's writer within the block as an error of ``path``.

    Args:
        path: the output, as the user named it.
        temporary: where the output is while it is written.

    Raises:
        ArtifactError: the disk is full, and the like.
        WriterError: the writer failed otherwise, or ended without a word.
    """
    try:
        with writing(path, temporary):
            yield
    except CheckpointException as error:  # no subclass of Exception, and no error of the disk
        raise WriterError(path, f"could not be written ({reason_of(error)})", FIX) from error


@contextmanager
def deaf_helpers() -> Iterator[None]:
    """Start the helper processes of Megatron's writer deaf to the signals that end a run.

    A launcher signals the whole process group. Megatron's writer forks helpers for a save: with the
    default reaction to SIGTERM or SIGUSR1 they died with the group, and the save failed. A process
    inherits the signals that its parent blocks. This process itself loses none: a blocked signal
    waits until the block ends.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        # Python's resource tracker comes first: its start unblocks SIGINT and SIGTERM in passing.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def load_sharded(state: dict[str, Any], path: Path, fix: str) -> dict[str, Any]:
    """Load the tensors that ``state`` describes from the folder ``path``.

    Megatron-Core unpickles the folder's index, so the safe reader checks the index first.

    Raises:
        ArtifactError: missing, torn, of another shape, not of tensors alone, or replaced meanwhile;
            ``fix`` says what to do.
    """
    place = OpenFolder(path)
    index = read_index(path, fix)
    check_common(path, fix)
    _check_kinds(state, index, path, fix)
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            value.merge_fn = partial(_filled, value.data, value.merge_fn)
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(
            state, str(path), validate_access_integrity=True
        )
    # CheckpointException is no subclass of Exception.
    except (Exception, CheckpointException) as error:
        place.require_there()
        raise unreadable(path, error, fix) from error
    place.require_there()  # else some of its files are those of another folder
    return loaded


def _check_kinds(state: dict[str, Any], index: Metadata, path: Path, fix: str) -> None:
    """Refuse integers in the place of real numbers, and the other way round: PyTorch's reader
    converts them in silence. Real numbers of another precision are converted on purpose.
    """
    for value in nested_values(state):
        parts = value.build() if isinstance(value, ShardedTensorFactory) else value
        for wanted in nested_values({"": parts}):
            saved = index.state_dict_metadata.get(getattr(wanted, "key", ""))
            if not isinstance(saved, TensorStorageMetadata) or not hasattr(wanted, "dtype"):
                continue
            found = saved.properties.dtype
            if found.is_floating_point != wanted.dtype.is_floating_point:
                raise ArtifactError(path, f"holds {wanted.key} as {found}, not {wanted.dtype}", fix)


def _filled(whole: torch.Tensor, join: Callable[[Any], Any], parts: Any) -> Any:
    """The tensor whose parts were read apart: ``whole`` where the parts are views of it, which the
    reader has filled. Megatron would join them in new memory, nearly half of a snapshot.
    """
    mine = whole.untyped_storage().data_ptr()
    tensors = list(nested_values(parts))
    if all(one.untyped_storage().data_ptr() == mine for one in tensors):
        return whole
    return join(parts)


def fill_from_hf(
    model: LanguageModel, arch: Architecture, mesh: Mesh, reader: WeightSource
) -> None:
    """Copy this rank's shard of every tensor from files; only this rank's slices are read.

    Raises:
        ArtifactError: numbers that are not finite, in the files or in the dtype of the model.
    """
    parameters = dict(model.named_parameters())
    table = model_rules(arch, mesh.tp)
    assert {rule.megatron for rule in table} == set(parameters), (
        "the mapping table does not fit the model"
    )
    first_problem = ""
    for rule in table:
        shard = rule.shard(reader.read, mesh.tp_rank, mesh.tp)
        with torch.no_grad():
            stored = parameters[rule.megatron].copy_(shard)
        first_problem = first_problem or not_finite(", ".join(rule.hf), shard, stored)
    if mesh.any(bool(first_problem)):  # all ranks leave together
        problem = first_problem or "holds numbers that are not finite, on another rank"
        raise ArtifactError(reader.folder, problem, FINITE)


def read_note(path: Path) -> dict[str, Any]:
    """The note beside Megatron weights: fingerprint, dtype, padded_vocab, source and more.

    Raises:
        ArtifactError: there are no weights.
    """
    required = {"fingerprint": str, "dtype": str, "padded_vocab": int}
    note = storage.read_object(path / NOTE, "Run the verb convert.", required)
    if not isinstance(getattr(torch, note["dtype"], None), torch.dtype):
        problem = f"names the dtype {note['dtype']!r}"
        raise ArtifactError(path / NOTE, problem, "Run the verb convert again.")
    return note


def float16_fingerprints(note: dict[str, Any]) -> tuple[str, ...]:
    """The fingerprints of the model's copies in fp16, from the note beside its weights. Notes of
    version 0.1.0 have none.
    """
    known = note.get("float16_fingerprints")
    return tuple(one for one in known if isinstance(one, str)) if isinstance(known, list) else ()


def load_weights(model: LanguageModel, path: Path) -> None:
    """Fill ``model`` with the Megatron weights in ``path``.

    Raises:
        ArtifactError: missing, torn, or another architecture.
    """
    loaded = load_sharded(sharded_state(model), path, "Run the verb convert again.")
    # A module's own extra state, such as Transformer Engine's, is no weight and is not saved.
    own = {key: value for key, value in model.state_dict().items() if key.endswith(EXTRA_STATE)}
    model.load_state_dict({**own, **loaded}, strict=True)
    model.clear_padding()
