"""Limits that a process inside the sandbox sets on itself before it runs anything that was not written here."""

import contextlib
import os
import resource
from collections.abc import Sequence

UID = 1000
"""The user inside the sandbox, whoever started it: the kernel does not hold root to a number of processes."""


def confine(keep: Sequence[int], seconds: int, memory: int, processes: int, file_size: int, files: int) -> None:
    """Give up root, close all files but the standard ones and `keep`, and set limits.

    Limits are processor seconds, bytes of address space and of each file, and numbers of processes and of open files.
    """
    for descriptor in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208  # a name needs no path
        if descriptor > 2 and descriptor not in keep:
            with contextlib.suppress(OSError):
                os.close(descriptor)
    if os.getuid() != UID:
        os.setgroups([])
        os.setresgid(UID, UID, UID)
        os.setresuid(UID, UID, UID)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # SIGXCPU, and SIGKILL for those that ignore it
    for kind, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_FSIZE, file_size),
        (resource.RLIMIT_NOFILE, files),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
