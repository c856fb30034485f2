"""A process that has imported the package's heavy dependencies and forks a child for every call.

torch, Megatron-Core and transformers take five seconds to import, and the tests start hundreds of
processes. A forked child finds the modules imported. The server calls no function of them before
it forks, so a child starts in the state of a fresh process after its imports: no thread runs, and
no kernel is loaded. Two things differ. All children of a server share its hash seed, so sets of
words have the same order in each: a test of such an order needs fresh processes. And the generators
of ``random`` and numpy, which the imports make, are seeded anew in each child. ``ForkServer`` is
the client's side; the bottom of the file is the server.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import gc
import importlib
import os
import pickle
import selectors
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
# Modules that nearly every child imports. A module that cannot be imported is the affair of the
# child that needs it: the server leaves it out, and the child fails with the module's own error.
PRELOADED = (
    "pytest",
    "torch.distributed.checkpoint",
    "tests.parallel.tiny",
    "tests.parallel.learning",
    "megamask.verbs.learn",
    "megamask.verbs.prune",
    "megamask.verbs.evaluate",
    # the kernels' modules, which are imported with the first draw
    "megamask.sparsity.categorical.gumbel_softmax_numba",
    "megamask.sparsity.subset.k_subset_numba",
    "megamask.optim.stochastic_rounding_numba",
    "numba.np.arrayobj",
    "numba.typed",
    # what a tokenizer loads
    "transformers.models.auto.tokenization_auto",
    "transformers.modeling_utils",
)
LENGTH = struct.Struct("!Q")


class Child:
    """A call that runs in a process group of its own, whose number is ``pid``.

    The number stays reserved until ``close``, so a signal never meets a stranger.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.pid: int = _receive(connection)
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the call runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code, as long as it takes without a ``timeout``.

        Raises:
            subprocess.TimeoutExpired: after ``timeout`` seconds.
        """
        if self._code is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._connection, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self._code = _receive(self._connection)
        return self._code

    def send_signal(self, number: int) -> None:
        """Send a signal to the child, not to its children."""
        os.kill(self.pid, number)

    def signal_group(self, number: int) -> None:
        """Send a signal to every process of the group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def close(self) -> None:
        """Kill what is left of the group."""
        self.signal_group(signal.SIGKILL)
        self._connection.close()


class ForkServer:
    """The server of this process; it ends with this process, and its children with it.

    Args:
        environment: variables of the server.
        enter: a command before the server's own, such as nsenter with its options.
        preloaded: the modules that the server imports.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        enter: Sequence[str] = (),
        preloaded: Sequence[str] = PRELOADED,
    ) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*enter, sys.executable, __file__, str(theirs.fileno()), *preloaded],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for this process, which closes the connection
            )
        atexit.register(self.close)

    def call(
        self,
        target: str,
        *args: Any,
        stdout: IO[Any],
        stderr: IO[Any],
        environment: Mapping[str, str],
        cwd: Path,
    ) -> Child:
        """Start ``target`` (``module:function``, which returns the exit code) in a new child.

        Args:
            target: what to call.
            args: picklable.
            stdout, stderr: open files of the child's output.
            environment: variables of the child. Those that a library reads at its import must be
                those of the server.
            cwd: working directory of the child.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            files = [theirs.fileno(), stdout.fileno(), stderr.fileno()]
            socket.send_fds(self._control, [b"."], files)
        _send(ours, (target, args, dict(environment), str(cwd)))
        return Child(ours)

    def close(self) -> None:
        """End the server and its children."""
        self._control.close()
        self._process.wait()


def child_environment() -> dict[str, str]:
    """The variables of a child: those of this process, and a thread for each child."""
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {
        **os.environ,
        "PYTHONPATH": search,
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
    }


def fork_server(environment: Mapping[str, str]) -> ForkServer:
    """The server of this process for children with these variables; made at the first call.

    Other variables get another server, since libraries read variables at their import.
    """
    kept = {key: value for key, value in environment.items() if key != "PYTEST_CURRENT_TEST"}
    return _server(frozenset(kept.items()))


@functools.cache
def _server(environment: frozenset[tuple[str, str]]) -> ForkServer:
    return ForkServer(dict(environment))


def _send(connection: socket.socket, message: Any) -> None:
    packed = pickle.dumps(message)
    connection.sendall(LENGTH.pack(len(packed)) + packed)


def _receive(connection: socket.socket) -> Any:
    (length,) = LENGTH.unpack(_read(connection, LENGTH.size))
    return pickle.loads(_read(connection, length))


def _read(connection: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = connection.recv(length - len(parts))
        if not part:
            raise EOFError("the fork server is gone")
        parts += part
    return bytes(parts)


# The server's side.


def serve(control: socket.socket) -> Callable[[], int] | None:
    """Fork a child for every request until the connection closes.

    Returns:
        In a child, what it has to do; in the server None, at the end.
    """
    running: dict[int, socket.socket] = {}
    ended: set[int] = set()
    wake, waker = os.pipe()
    for end in (wake, waker):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(wake, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if wake in ready:
                os.read(wake, 4096)
                ended |= {pid for pid in running.keys() - ended if _tell_end(pid, running[pid])}
            for pid, connection in [*running.items()]:
                if connection in ready:  # the client closed it
                    selector.unregister(connection)
                    _reap(pid, running.pop(pid))
                    ended.discard(pid)
            if control in ready:
                message, files, _, _ = socket.recv_fds(control, 1, 3)
                if not message:
                    for pid, connection in running.items():
                        _reap(pid, connection)
                    return None
                connection = socket.socket(fileno=files[0])
                request = _receive(connection)
                pid = os.fork()
                if pid == 0:
                    os.setpgid(0, 0)
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for open_one in (control, *running.values(), connection):
                        open_one.close()
                    for end in (wake, waker):
                        os.close(end)
                    return _settle(files[1:], *request)
                with contextlib.suppress(PermissionError):
                    os.setpgid(pid, pid)  # the child does the same: whoever comes first
                for file in files[1:]:
                    os.close(file)
                running[pid] = connection
                selector.register(connection, selectors.EVENT_READ)
                _send(connection, pid)


def _tell_end(pid: int, connection: socket.socket) -> bool:
    """Send the exit code of a child if it has ended; its number stays taken."""
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if ended is None:
        return False
    exited = ended.si_code == os.CLD_EXITED
    with contextlib.suppress(BrokenPipeError):
        _send(connection, ended.si_status if exited else -ended.si_status)
    return True


def _reap(pid: int, connection: socket.socket) -> None:
    connection.close()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _settle(
    files: list[int], target: str, args: tuple[Any, ...], environment: dict[str, str], cwd: str
) -> Callable[[], int]:
    """Make the forked child what a fresh process would be."""
    for number, file in enumerate(files, 1):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    numpy = sys.modules.get("numpy")
    if numpy is not None:  # ``random`` seeds itself anew after a fork
        numpy.random.seed()
    module, name = target.split(":")
    return lambda: int(getattr(importlib.import_module(module), name)(*args))


def preload(names: Iterable[str]) -> None:
    """Import the modules that can be imported."""
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def main() -> int:
    """Import, then fork for whoever holds the other end of the connection."""
    control = socket.socket(fileno=int(sys.argv[1]))
    faulthandler.enable()
    preload(sys.argv[2:])
    if "numba" in sys.modules:
        importlib.import_module("tests.compile_once").compile_once()
    gc.collect()
    gc.freeze()  # a collection in a child does not touch, hence copy, the pages of the modules
    call = serve(control)
    return call() if call else 0


if __name__ == "__main__":
    sys.exit(main())
