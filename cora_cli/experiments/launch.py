"""Steps as processes of this machine: each with its log, its share of the processors or one GPU.

A launcher knows nothing of plans: it starts words after `cora`, and tells when they ended. The one for clusters is `slurm`.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import cora_cli
from cora_cli.errors import CoraError

_PATIENCE_SECONDS = 10.0


class Job(Protocol):
    """One step that was started."""

    pid: int | None
    """Its process on this machine, if it has one."""

    def ended(self) -> int | None:
        """The exit code, or None while it goes on."""

    def stop(self) -> None:
        """End it, and return when it has ended."""


class Launcher(Protocol):
    """Where steps run: at most `slots` at a time. `how` is what is said of one that was handed over."""

    slots: int
    how: str

    def submit(self, kind: str, argv: Sequence[str], log: Path) -> Job:
        """Start `cora ARGV`, everything it says going to the end of `log`; `kind` is the step's.

        Raises `CoraError` where it cannot be started.
        """


class LocalLauncher:
    """Processes of this machine; with GPUs each has one to itself, without them an equal share of the threads."""

    how = "started"

    def __init__(self, jobs: int | None, device: str, keep_open: Sequence[int] = ()) -> None:
        """`keep_open` are file descriptors that the processes inherit: a lock that they hold while they live."""
        self._gpus = visible_gpus() if device in ("auto", "cuda") else []
        self.slots = jobs or max(1, len(self._gpus))
        if self._gpus and self.slots > len(self._gpus):
            raise CoraError(
                f"--jobs {self.slots} was asked for, but only {len(self._gpus)} GPU(s) are visible: one job takes one"
            )
        self._free = list(range(self.slots))
        self._keep_open = tuple(keep_open)

    def submit(self, kind: str, argv: Sequence[str], log: Path) -> "LocalJob":
        """See `Launcher.submit`."""
        slot = self._free.pop(0)
        return LocalJob(argv, log, self._environment(slot), self._keep_open, lambda: self._free.append(slot))

    def _environment(self, slot: int) -> dict[str, str]:
        root = str(Path(cora_cli.__file__).parents[1])
        paths = [root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[slot]
        elif self.slots > 1:
            processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            threads = int(os.environ.get("OMP_NUM_THREADS") or processors)
            environment["OMP_NUM_THREADS"] = str(max(1, threads // self.slots))
        return environment


class LocalJob:
    """A process; see `Job`."""

    def __init__(
        self, argv: Sequence[str], log: Path, environment: dict[str, str], keep_open: Sequence[int], done: Callable[[], None]
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._done: Callable[[], None] | None = done
        with log.open("ab") as file:
            file.write(f"$ cora {' '.join(argv)}\n".encode())
            file.flush()
            command = [sys.executable, "-m", "cora_cli", *argv]
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, pass_fds=tuple(keep_open)
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
        """Ask it to end, and make it where it does not: a run keeps its last whole checkpoint either way."""
        self._process.terminate()
        try:
            self._process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def visible_gpus() -> list[str]:
    """The names under which CUDA_VISIBLE_DEVICES shows one GPU each."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        return [name for name in shown.split(",") if name.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]
