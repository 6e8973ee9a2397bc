"""Runs one step in several processes: torchrun on each node of a job starts those of its node, and all meet on the first node.

submitit starts this once per node. `slurm` queues the job.
"""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cora_cli import writing
from cora_cli.experiments.launch import PROMPT

_PORTS = range(15000, 32000)
"""Below the ports that systems take for connections."""


@dataclasses.dataclass(frozen=True)
class Spread:
    """The processes of a step: `per_node` on each of `nodes`."""

    nodes: int = 1
    per_node: int = 1

    @property
    def node(self) -> int:
        """The number of this node in the job; that of the first one is 0."""
        return int(_task().node) if self.nodes > 1 else 0

    def log_here(self, log: Path) -> Path:
        """Where this node writes: `log`, or a file next to it on a node that is not the first, since shared disks mix up appended lines."""
        return log.with_name(f"{log.stem}.node{self.node}{log.suffix}") if self.node else log

    def start(self, argv: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start the processes of `cora ARGV` on this node, and append their output to `log_here(log)`."""
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}  # torchrun does not pass -P on
        if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
            # By default torch uses all processors of the node, not only those of the job.
            environment["OMP_NUM_THREADS"] = str(max(1, int(cpus) // self.per_node))
        with writing.open_to_append(self.log_here(log)) as file:
            file.write(f"{PROMPT}{' '.join(argv)}\n".encode())
            file.flush()
            command = [sys.executable, "-P", "-m", *self.torchrun(), "cora_cli", *argv]
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment)

    def torchrun(self) -> list[str]:
        """torchrun and its arguments, up to those of the module that it runs."""
        start = ["torch.distributed.run", f"--nproc-per-node={self.per_node}"]
        if self.nodes == 1:
            return [*start, "--standalone", "-m"]
        task = _task()
        # Jobs that share a node get different ports.
        port = _PORTS.start + int(task.job_id) % len(_PORTS)
        place = [f"--nnodes={self.nodes}", f"--node-rank={task.node}", f"--master-addr={task.hostnames[0]}"]
        return [*start, *place, f"--master-port={port}", "-m"]


def _task() -> Any:
    """The task of a job that this process is, as submitit knows it."""
    from submitit import JobEnvironment

    return JobEnvironment()
