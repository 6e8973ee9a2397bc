"""Bounds for what other people's files make this process compute: chat templates are programs, and adapters hold regular expressions."""

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from cora_cli.errors import CoraError

SECONDS = 10.0
"""Longer than any honest template or pattern needs for one record or model, and short enough to wait for."""
BYTES = 2 << 30


@contextlib.contextmanager
def bounded(what: str, seconds: float = SECONDS, extra_bytes: int = BYTES) -> Iterator[None]:
    """Raise `CoraError` if the block takes longer than `seconds`, or this process grows by more than `extra_bytes` in it.

    `what` starts the sentence. The time is bounded in the main thread of a process only, because it takes a signal; memory is bounded on
    Linux.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise CoraError(f"{what} took more than {seconds:g} s, so it was stopped; it may never end")

    alarmed = threading.current_thread() is threading.main_thread()
    if alarmed:
        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with _bounded_memory(extra_bytes):
            yield
    except MemoryError as error:
        raise CoraError(f"{what} needs more than {extra_bytes / 2**30:g} GiB of memory, so it was stopped") from error
    except RecursionError as error:
        raise CoraError(f"{what} calls itself without end, so it was stopped") from error
    finally:
        if alarmed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _bounded_memory(extra_bytes: int) -> Iterator[None]:
    size = Path("/proc/self/statm")
    if not size.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = int(size.read_text(encoding="ascii").split()[0]) * resource.getpagesize() + extra_bytes
    known = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([wanted, *known]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
