"""One writer at a time for each artefact, and no writer while a process reads.

A lock is a file ``.NAME.lock`` beside the artefact NAME. Its holder keeps the file locked with
``flock``, which the kernel releases when the process ends, however it ends; on NFS the lock covers
other hosts too. Where a file system has no such locks, or keeps them to one host, the content of
the file decides: one line of JSON for each holder, whose thread touches the file every ``BEAT``
seconds. A holder on another host counts as gone after ``SILENCE`` seconds without a touch. The
clock of the file server alone is read.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megamask.errors import ArtifactError
from megamask.machine_errors import writing
from megamask.process.holder import Holder
from megamask.process.lock_file import (
    SILENCE,
    Kernel,
    Lines,
    age_of,
    cross_out,
    flock,
    is_file,
    line_of,
    lines_of,
    living,
    read_lines,
)
from megamask.process.signals import leave_to_main_thread

BEAT = 10.0
PATIENCE = 1.0  # seconds; a reader that starts or ends keeps everybody out for a moment
SETTLE = 0.2  # seconds, much longer than the writing of a line
AGAIN = -1  # no descriptor


@contextmanager
def locked(what: str, writes: Iterable[Path], reads: Iterable[Path] = ()) -> Iterator[None]:
    """Hold the locks of artefacts inside the block.

    An artefact whose folder cannot be written gets no lock: a writer fails there on its own, and a
    reader needs none.

    Args:
        what: the command that holds them, for the message of those who come second.
        writes: artefacts that this process alone may touch.
        reads: artefacts that must stay as they are; several processes may read.

    Raises:
        ArtifactError: another process holds a lock, which the message names; or the disk is full.
    """
    holder = Holder.this_process(what)
    written = {lock: path for path in writes if (lock := _lock_of(path))}
    read = {lock: path for path in reads if (lock := _lock_of(path))}
    with ExitStack() as stack:
        held = []
        for lock in sorted(written.keys() | read.keys()):
            path = written.get(lock) or read[lock]
            descriptor = stack.enter_context(_held(lock, path, holder, is_writer=lock in written))
            if descriptor is not None:
                held.append(descriptor)
        stack.enter_context(_beating(held))
        yield


def writer_of(path: Path) -> Holder | None:
    """The living process that holds the artefact ``path`` as its writer; None for nobody.

    A guess from the outside, for people to read: the lock is not touched.
    """
    lock = _lock_of(path)
    if lock is None or not lock.is_file():
        return None
    try:
        lines, age = lines_of(lock.read_bytes()), age_of(lock)
    except OSError:
        return None
    writers = [holder for holder, is_writer in lines if is_writer]
    living = (one for one in writers if (one.is_running() if one.is_here() else age < SILENCE))
    return next(living, None)


def _lock_of(path: Path) -> Path | None:
    """The file of the lock; None for the root, which has no name. Links in a circle stay as they
    are: whoever opens the artefact tells of them.
    """
    whole = Path(os.path.realpath(path))
    return whole.with_name(f".{whole.name}.lock") if whole.name else None


@contextmanager
def _held(lock: Path, path: Path, holder: Holder, is_writer: bool) -> Iterator[int | None]:
    made = _make_parents(lock.parent) if is_writer else []
    try:
        descriptor = _take(lock, path, holder, is_writer)
        if descriptor is None:
            yield None
            return
        # A forked child would keep the lock after the end of this process.
        os.register_at_fork(after_in_child=lambda: _close(descriptor, lock))
        try:
            yield descriptor
        finally:
            _release(descriptor, lock, holder, is_writer)
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # the folder holds something by now
                folder.rmdir()


def _take(lock: Path, path: Path, holder: Holder, is_writer: bool) -> int | None:
    """The descriptor of the locked file; None where no file can be made."""
    patience = time.monotonic() + PATIENCE
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except PermissionError:
            found = _of_another_user(lock, path, is_writer, time.monotonic() > patience)
            if found is AGAIN:
                continue
            return found
        except OSError:
            return None
        _open_to_writers(descriptor, lock.parent)
        try:
            state = flock(descriptor, fcntl.LOCK_EX)
            is_alone = state is Kernel.TAKEN
            if state is Kernel.BUSY and not is_writer:
                state = flock(descriptor, fcntl.LOCK_SH)
            if state is Kernel.BUSY and time.monotonic() > patience:
                raise _refusal(path, read_lines(descriptor))
            if state is Kernel.BUSY:
                time.sleep(0.05)
            elif is_file(descriptor, lock):
                _refuse_others(descriptor, lock, path, is_writer, state)
                starts_anew = is_alone or (is_writer and state is Kernel.ABSENT)
                starts_anew = starts_anew and not living(descriptor, lock, state)
                _sign(descriptor, lock, holder, is_writer, starts_anew)
                if is_alone and not is_writer:
                    flock(descriptor, fcntl.LOCK_SH)
                if state is Kernel.ABSENT:
                    _refuse_rival(descriptor, path, holder, is_writer)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # busy, or its last holder removed the file in between


def _of_another_user(lock: Path, path: Path, is_writer: bool, is_late: bool) -> int | None:
    """What ``_take`` returns where the file belongs to another user and cannot be written; AGAIN
    where it is worth another try. Whoever may write the folder may remove the file, and does so
    where nobody holds it; a reader holds it without a line of its own.
    """
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except FileNotFoundError:  # its holder removed it, or no file can be made here
        return None if is_late or not os.access(lock.parent, os.W_OK) else AGAIN
    except OSError:
        return None
    try:
        state = flock(descriptor, fcntl.LOCK_EX if is_writer else fcntl.LOCK_SH)
        others = living(descriptor, lock, state)
        if state is Kernel.BUSY or (others and (is_writer or any(one[1] for one in others))):
            if is_late:
                raise _refusal(path, read_lines(descriptor))
            time.sleep(0.05)
        elif is_file(descriptor, lock):  # and not yet the file of somebody who came meanwhile
            if not is_writer:
                return os.dup(descriptor)  # the same lock
            lock.unlink()
    except FileNotFoundError:
        pass
    except OSError:  # the folder cannot be written either
        return None
    finally:
        os.close(descriptor)
    return AGAIN


def _open_to_writers(descriptor: int, folder: Path) -> None:
    """Let everybody who may write the folder write the file of the lock, whatever the umask."""
    with contextlib.suppress(OSError):  # another user's file
        mode = os.fstat(descriptor).st_mode | folder.stat().st_mode & 0o022
        os.fchmod(descriptor, mode & 0o777)


def _sign(descriptor: int, lock: Path, holder: Holder, is_writer: bool, starts_anew: bool) -> None:
    """Write the line of ``holder`` into the file; where that fails, no empty file stays.

    Raises:
        ArtifactError: the disk is full.
    """
    line = line_of(holder, is_writer)
    try:
        with writing(lock):
            if starts_anew:
                os.ftruncate(descriptor, 0)
            if os.write(descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except ArtifactError:
        if starts_anew or os.fstat(descriptor).st_size == 0:
            lock.unlink(missing_ok=True)
        raise


def _refuse_others(descriptor: int, lock: Path, path: Path, is_writer: bool, state: Kernel) -> None:
    """Refuse where a holder lives that the kernel's lock does not tell of."""
    age = age_of(lock)
    others = [
        (other, writes)
        for other, writes in read_lines(descriptor)
        if (is_writer or writes)
        # The kernel would have kept the lock from us if a process of this system had it.
        and not (state is not Kernel.ABSENT and other.shares_kernel())
        and (other.pid != os.getpid() and other.is_running() if other.is_here() else age < SILENCE)
    ]
    if others:
        raise _refusal(path, others, f" If that process is gone for certain, delete {lock}.")


def _refuse_rival(descriptor: int, path: Path, holder: Holder, is_writer: bool) -> None:
    """Without the kernel's help: the last of several who wrote their lines at once has the lock."""
    time.sleep(SETTLE)
    lines = read_lines(descriptor)
    if (holder, is_writer) not in lines or (is_writer and len(lines) > 1):
        raise _refusal(path, [one for one in lines if one[0] != holder])


def _release(descriptor: int, lock: Path, holder: Holder, is_writer: bool) -> None:
    """Give the lock back, and remove its file if nobody else holds it."""
    with contextlib.suppress(OSError):  # a reader's file may be another user's
        cross_out(descriptor, lock, holder, is_writer)
    state = flock(descriptor, fcntl.LOCK_EX)
    with contextlib.suppress(OSError):
        is_last = state is not Kernel.BUSY and is_file(descriptor, lock)
        if is_last and all(one == holder for one, _ in living(descriptor, lock, state)):
            lock.unlink(missing_ok=True)
    os.close(descriptor)


def _refusal(path: Path, holders: Lines, more: str = "") -> ArtifactError:
    holders = [one for one in holders if not one[0].is_here() or one[0].is_running()]
    if not holders:
        return ArtifactError(path, "is held by a process that just started", "Start again.")
    holder, writes = next((one for one in holders if one[1]), holders[0])
    problem = f"is being {'written' if writes else 'read'} by {holder}"
    fix = f"Wait for its end, or end it: {holder.how_to_end()}.{more}"
    return ArtifactError(path, problem, fix)


@contextmanager
def _beating(descriptors: list[int]) -> Iterator[None]:
    """Touch the files of the locks every ``BEAT`` seconds inside the block."""
    done = threading.Event()

    def beat() -> None:
        leave_to_main_thread()
        while not done.wait(BEAT):
            for descriptor in descriptors:
                with contextlib.suppress(OSError):  # a full disk must not end the thread
                    os.utime(descriptor)

    thread = threading.Thread(target=beat, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _close(descriptor: int, lock: Path) -> None:
    with contextlib.suppress(OSError):
        if is_file(descriptor, lock):  # the number may mean another file by now
            os.close(descriptor)


def _make_parents(folder: Path) -> list[Path]:
    """Make ``folder``; return the folders that were missing, the innermost first."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return []
    return missing
