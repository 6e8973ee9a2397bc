"""A process that has imported torch, transformers and peft once and becomes a step by forking, so that a step need not import them.

`ForkServer` starts it and asks it for steps over a socket. As a module (`python -m`) this is the server: it starts no thread, draws no
random number and does not touch CUDA. A step starts from the same state as a new process; only the seed of Python's string hashes,
on which no result depends, is shared. Steps outlive a server and a `cora ablate` that are killed, as processes of their own do.
"""

import array
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from cora_cli.environment import forget_settings, quiet_libraries
from cora_cli.errors import CoraError
from cora_cli.evaluation.metrics import NAMES, build_metrics

_LENGTH_BYTES = 4
_MOST_DESCRIPTORS = 8
_POLL_SECONDS = 0.02
_MODULES = (
    *("cora_cli.training.run", "cora_cli.evaluation.evaluate", "cora_cli.extraction.extract"),
    *("cora_cli.cli", "pydantic.type_adapter", "torch.utils.data", "transformers.models.auto.modeling_auto"),
)
# It belongs to pyarrow's allocator, which is prepared for a fork.
_HARMLESS_THREADS = frozenset({"jemalloc_bg_thd"})
# Meant for the steps and for what starts them, which ends the server by closing the socket. Slurm's warnings are SIGUSR2.
_FOR_STEPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
_PROGRAM = ("-P", "-m", __name__)
_READY, _STARTED, _ENDED = "ready", "started", "ended"


class ForkServer:
    """The server as seen from the process that needs steps; it ends with this object. `usable` says whether it can start them.

    `output` receives what the libraries print when they are imported.
    """

    def __init__(self, environment: Mapping[str, str], output: BinaryIO) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, *_PROGRAM, str(theirs.fileno())]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(environment),
                pass_fds=(theirs.fileno(),),
            )
        self._socket, self._received = ours, b""
        self._codes: dict[int, int] = {}
        self.usable = True
        weakref.finalize(self, _end, self._process, ours)
        self._wait_for(_READY)

    @staticmethod
    def exists_here() -> bool:
        """Whether the system can fork a process with these libraries safely. On macOS its frameworks forbid it."""
        return sys.platform == "linux"

    def start(
        self, argv: Sequence[str], environment: Mapping[str, str], output: BinaryIO, keep_open: Sequence[int]
    ) -> int | None:
        """Start `cora ARGV` with this environment and return its process id, or None if the server has ended.

        It inherits the descriptors in `keep_open`.
        """
        request = json.dumps({"argv": list(argv), "environment": dict(environment), "directory": str(Path.cwd())}).encode()
        descriptors = array.array("i", [output.fileno(), *keep_open])
        try:
            self._socket.sendmsg(
                [len(request).to_bytes(_LENGTH_BYTES, "big")],
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)],
            )
            self._socket.sendall(request)
            return self._wait_for(_STARTED)
        except OSError:
            self.usable = False
            return None
        except BaseException:  # an interruption: the step must not go on unnoticed
            if (pid := self._wait_for(_STARTED)) is not None:
                self.send(pid, signal.SIGTERM)
            raise

    def ended(self, pid: int) -> int | None:
        """The exit code of a step, negative for a signal as in `subprocess`; None while it is running or if nobody knows."""
        self._receive(0)
        return self._codes.get(pid)

    def send(self, pid: int, number: int) -> None:
        """Send a signal to a step. The server does so, as only it knows whether the process id is still that of the step."""
        message = json.dumps({"signal": [pid, number]}).encode()
        try:
            self._socket.sendall(len(message).to_bytes(_LENGTH_BYTES, "big") + message)
        except OSError:
            self.usable = False

    def _wait_for(self, what: str) -> int | None:
        """Wait for the server to be ready, or for the process id of the step that it started; None if it has ended instead."""
        while self.usable:
            if (found := self._receive(None, what)) is not None:
                return found
        return None

    def _receive(self, seconds: float | None, what: str = "") -> int | None:
        """Read what the server says, waiting for at most `seconds`; returns the number that came with `what`."""
        answer = None
        while self.usable and select.select([self._socket], [], [], seconds)[0]:
            try:
                part = self._socket.recv(4096)
            except OSError:
                part = b""
            if not part:
                self.usable = False
                break
            *lines, self._received = (self._received + part).split(b"\n")
            for line in lines:
                kind, pid, code = json.loads(line)
                if kind == _ENDED:
                    self._codes[pid] = code
                elif kind == what:
                    answer = pid
            if answer is not None:
                break
        return answer


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    process.kill()
    process.wait()


def is_running(pid: int) -> bool:
    """Whether a process that is nobody's child here is running; a process that has ended but was not collected is not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in ("Z", "X")


def stop_orphan(pid: int, grace: float) -> None:
    """Terminate a step whose server was killed, and kill it after `grace` seconds."""
    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, grace)):
        until = time.monotonic() + seconds
        while is_running(pid) and time.monotonic() < until:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            time.sleep(_POLL_SECONDS)


class _Server:
    """The loop of the server, in the process that forks."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._children: set[int] = set()

    def serve(self) -> bool:
        """Start steps until the other side is gone; returns True in each step and False in the server."""
        wake, woken = os.pipe()
        for end in (wake, woken):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(woken)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        while True:
            watched: list[Any] = [self._socket, wake]
            ready, _, _ = select.select(watched, [], [])
            if wake in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(wake, 4096)
                self._reap()
            if self._socket in ready:
                message, descriptors = self._read()
                if message is None:
                    return False
                if "signal" in message:
                    pid, number = message["signal"]
                    if pid in self._children:
                        os.kill(pid, number)
                elif self._start(message, descriptors):
                    signal.set_wakeup_fd(-1)
                    os.close(wake)
                    os.close(woken)
                    return True

    def _read(self) -> tuple[Any, list[int]]:
        """The next message with its descriptors; None if the other side is gone."""
        try:
            head, descriptors, _, _ = socket.recv_fds(self._socket, _LENGTH_BYTES, _MOST_DESCRIPTORS)
            head += self._exactly(_LENGTH_BYTES - len(head)) if head else b""
            body = self._exactly(int.from_bytes(head, "big"))
        except OSError:
            return None, []
        return (json.loads(body) if body else None), descriptors

    def _exactly(self, count: int) -> bytes:
        found = b""
        while len(found) < count and (part := self._socket.recv(count - len(found))):
            found += part
        return found if len(found) == count else b""

    def _start(self, message: Mapping[str, Any], descriptors: Sequence[int]) -> bool:
        # A signal that arrives while the fork still ignores it must not be lost.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_STEPS)
        pid = os.fork()
        if pid == 0:
            self._socket.close()
            _become(message, descriptors)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return True
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for descriptor in descriptors:
            os.close(descriptor)
        self._children.add(pid)
        self._say(_STARTED, pid)
        return False

    def _reap(self) -> None:
        for child in [*self._children]:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                self._children.remove(pid)
                self._say(_ENDED, pid, os.waitstatus_to_exitcode(status))

    def _say(self, *words: object) -> None:
        # Nobody may be listening any more; the loop sees that.
        with contextlib.suppress(OSError):
            self._socket.sendall(json.dumps([*words, 0][:3]).encode() + b"\n")


def _become(message: Mapping[str, Any], descriptors: Sequence[int]) -> None:
    """Turn this fork into a process as it would be just after it had started and imported the libraries."""
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output, *keep_open = descriptors
    for standard in (1, 2):
        os.dup2(output, standard)
    os.close(output)
    for descriptor in keep_open:
        os.set_inheritable(descriptor, True)
    os.environ.clear()
    os.environ.update(message["environment"])
    os.chdir(message["directory"])
    sys.argv[1:] = message["argv"]
    # Python's own generator does this by itself. Both are seeded by chance in a new process too.
    import numpy as np
    import torch

    np.random.seed()
    torch.seed()


def _import_libraries() -> None:
    """Import what steps need. Raises `CoraError` if a fork of this process would not be like a new one."""
    import importlib
    import threading

    import torch

    for name in _MODULES:
        importlib.import_module(name)
    build_metrics(NAMES)  # imports each metric's library, and loads nothing
    conversion_mapping = importlib.import_module("transformers.conversion_mapping")
    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # the table of all families, which takes a tenth of a second
    pid = os.fork()
    if pid == 0:
        os._exit(bool(torch.cuda.is_initialized() or torch.cuda._is_in_bad_fork()))
    if os.waitpid(pid, 0)[1] != 0:
        raise CoraError("importing the libraries started CUDA, which does not survive a fork")
    # OpenBLAS stops its threads before a fork, and starts them again when it needs them.
    tasks = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    others = sorted(name for name in tasks if name not in _HARMLESS_THREADS)
    if threading.active_count() > 1 or len(others) > 1:
        raise CoraError(f"importing the libraries started threads, which do not survive a fork: {', '.join(others)}")
    gc.collect()
    gc.freeze()


def _serve(descriptor: int) -> bool:
    for number in _FOR_STEPS:
        signal.signal(number, signal.SIG_IGN)
    quiet_libraries()
    try:
        forget_settings()
        _import_libraries()
    except (CoraError, ImportError) as error:
        print(f"steps start as new processes: {error}", flush=True)
        return False
    server = _Server(socket.socket(fileno=descriptor))
    server._say(_READY, 0)
    return server.serve()


if __name__ == "__main__" and _serve(int(sys.argv[1])):
    runpy.run_module("cora_cli", run_name="__main__", alter_sys=True)
