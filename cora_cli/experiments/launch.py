"""Runs steps as processes on this machine, each with its own log and with one GPU, a share of one, or a share of the CPU threads.

A launcher starts `cora` commands and reports when they end; `slurm` has the launcher for clusters.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from cora_cli import writing
from cora_cli.environment import folder_to_search
from cora_cli.errors import CoraError
from cora_cli.experiments.fork_server import ForkServer, stop_orphan

_GRACE_SECONDS, _POLL_SECONDS = 10.0, 0.02
PROMPT = "$ cora "
"""How a log begins, and every further call in it, before the arguments of the command."""


class Job(Protocol):
    """A step that was started."""

    pid: int | None
    """Process id on this machine, if there is one."""

    def ended(self) -> int | None:
        """The exit code, or None while the step is running."""

    def stop(self) -> None:
        """Stop the step, and return when it has ended."""


class Launcher(Protocol):
    """Runs at most `slots` steps at a time. `how` is the status shown for a submitted step, such as "started"."""

    slots: int
    how: str

    def submit(self, kind: str, argv: Sequence[str], log: Path) -> Job:
        """Start `cora ARGV` and append its output to `log`; `kind` is the kind of step.

        Raises `CoraError` if it cannot be started.
        """


class LocalLauncher:
    """Runs steps as processes on this machine. Each has one GPU, which others may share, or an equal share of the CPU threads."""

    how = "started"

    def __init__(
        self, jobs: int | None, device: str, keep_open: Sequence[int] = (), per_gpu: int = 1, forks: bool = True
    ) -> None:
        """`keep_open` has file descriptors for the processes to inherit, such as a lock to hold while they run.

        `per_gpu` is the number of steps that share a GPU. `forks` says whether steps may be forks of a process that has imported the
        libraries. Raises `CoraError` if `jobs` exceeds the number that all GPUs run together.
        """
        self._gpus = visible_gpus() if device in ("auto", "cuda") else []
        most = len(self._gpus) * per_gpu
        self.slots = jobs or max(1, most)
        if self._gpus and self.slots > most:
            each = (
                "each step uses one GPU; --jobs-per-gpu lets several share one"
                if per_gpu == 1
                else f"{per_gpu} steps share each"
            )
            raise CoraError(f"--jobs must be at most {most} with {len(self._gpus)} visible GPUs, not {self.slots}: {each}")
        self._free = list(range(self.slots))
        self._keep_open = tuple(keep_open)
        self._server: ForkServer | None = None
        self._forks = forks and ForkServer.exists_here()

    def submit(self, kind: str, argv: Sequence[str], log: Path) -> Job:
        """See `Launcher.submit`. The step is a fork of a process that has imported the libraries, or else a new process."""
        slot = self._free.pop(0)
        environment = self._environment(slot)
        log.parent.mkdir(parents=True, exist_ok=True)
        with writing.open_to_append(log) as file:
            file.write(f"{PROMPT}{' '.join(argv)}\n".encode())
            file.flush()
            if self._forks and (self._server is None or not self._server.usable):
                self._server = ForkServer(environment, file)
                self._forks = self._server.usable
            if self._forks and self._server is not None:
                pid = self._server.start(argv, environment, file, self._keep_open)
                if pid is not None:
                    return ForkedJob(self._server, pid, log, lambda: self._free.append(slot))
            return LocalJob(argv, file, environment, self._keep_open, lambda: self._free.append(slot))

    def _environment(self, slot: int) -> dict[str, str]:
        paths = [folder_to_search(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
        elif self.slots > 1:
            processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            # It may be a list, with the threads of each nested level.
            given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
            threads = int(given) if given.isdecimal() else processors
            environment["OMP_NUM_THREADS"] = str(max(1, threads // self.slots))
        return environment


class LocalJob:
    """A process of its own; see `Job`."""

    def __init__(
        self,
        argv: Sequence[str],
        output: BinaryIO,
        environment: dict[str, str],
        keep_open: Sequence[int],
        done: Callable[[], None],
    ) -> None:
        self._done: Callable[[], None] | None = done
        command = [sys.executable, "-P", "-m", "cora_cli", *argv]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, pass_fds=tuple(keep_open)
        )
        self.pid: int | None = self._process.pid

    def ended(self) -> int | None:
        """See `Job.ended`."""
        code = self._process.poll()
        if code is not None and self._done is not None:
            self._done()
            self._done = None
        return code

    def stop(self) -> None:
        """Terminate the process, and kill it after a grace period. A run keeps its last complete checkpoint in both cases."""
        self._process.terminate()
        try:
            self._process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class ForkedJob:
    """A fork of the server; see `Job`."""

    def __init__(self, server: ForkServer, pid: int, log: Path, done: Callable[[], None]) -> None:
        self._server, self._log, self._done = server, log, done
        self._pid = pid
        self.pid: int | None = pid
        self._code: int | None = None

    def ended(self) -> int | None:
        """See `Job.ended`. Without the server nobody will know the exit code, so the step is stopped and has failed."""
        if self._code is not None:
            return self._code
        self._code = self._server.ended(self._pid)
        if self._code is None and not self._server.usable:
            stop_orphan(self._pid, _GRACE_SECONDS)
            with writing.open_to_append(self._log) as file:
                file.write(b"cora: error: the process that had started this step was killed\n")
            self._code = 1
        if self._code is not None:
            self._done()
        return self._code

    def stop(self) -> None:
        """Terminate the process, and kill it after a grace period. A run keeps its last complete checkpoint in both cases."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.ended() is not None:
                return
            self._server.send(self._pid, number)
            until = time.monotonic() + _GRACE_SECONDS
            while self.ended() is None and time.monotonic() < until:
                time.sleep(_POLL_SECONDS)


def visible_gpus() -> list[str]:
    """Values of CUDA_VISIBLE_DEVICES that select one GPU each."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        return [name for name in shown.split(",") if name.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def free_gpu_bytes() -> int:
    """The free memory of the visible GPU that has the least."""
    import torch

    return min(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
