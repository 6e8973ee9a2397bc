"""Temporary directories of running commands. What a killed command leaves behind is removed by the next one, and only that.

Each directory is itself locked with `flock` for as long as it is used, so it is a process that tells whether it is abandoned, not its age.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "cora-scratch-"


@contextlib.contextmanager
def temporary_directory(purpose: str, parent: Path | None = None, prefix: str = _PREFIX) -> Iterator[Path]:
    """An empty directory for the block, in the system's directory for temporary files or in `parent`.

    Raises `OSError` where it cannot be created. What cannot be removed at the end is left to the next command.
    """
    remove_abandoned(parent, prefix)
    descriptor, path = _create(f"{prefix}{purpose}-", parent)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def remove_abandoned(parent: Path | None = None, prefix: str = _PREFIX) -> None:
    """Remove the directories of this user that no process holds, below `parent` or the system's directory for temporary files."""
    with contextlib.suppress(OSError):  # such as no directory for temporary files
        for path in Path(parent or tempfile.gettempdir()).glob(f"{prefix}*"):
            with contextlib.suppress(OSError):  # of another user, or removed by another command
                _remove_if_abandoned(path)


def _create(prefix: str, parent: Path | None) -> tuple[int, Path]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # another command took it for abandoned before it was locked
        _lock(descriptor)
        if path.exists():
            return descriptor, path
        os.close(descriptor)


def _remove_if_abandoned(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid == os.geteuid() and _lock(descriptor):
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Whether this process holds the directory now: not where another does, nor on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        return False
    return True
