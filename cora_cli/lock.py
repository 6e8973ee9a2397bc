"""One command at a time for each output: a lock of the operating system, and what the command before it left behind.

The lock is `flock` on a small file that names its holder: `OUT/.lock` for a command that writes files into the directory OUT, and
`.NAME.lock` next to an output that appears all at once. A killed holder releases it. The file is removed by its holder, so after
opening it one must check that it is still in its place.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from cora_cli import rundir, writing
from cora_cli.errors import CoraError
from cora_cli.progress import say
from cora_cli.scratch import remove_abandoned

_TRIES, _PAUSE_SECONDS = 4, 0.05
_MOST_ABSENT = 100
_NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK})
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.\w{8}\.tmp")


@contextlib.contextmanager
def own_directory(out: Path, *parts: str) -> Iterator[int]:
    """Hold the directory `out`, created if need be, and remove what killed commands left; yields the lock's descriptor.

    `parts` names the folders below which the command also writes and the files it appends to. A directory that it created and left
    empty disappears again. Raises `CoraError` if another process holds `out`, if `out` or a part is a symbolic link, for a place in the result of
    a run, and for one whose name is no text.
    """
    for place in (out, *(out / part for part in parts)):
        writing.refuse_link(place)
    _refuse_place(out)
    if not writing.absolute(out).name:
        raise CoraError(f"{out} cannot be an output directory; choose a new or empty one")
    writing.refuse_file(out)
    with _hold(out / ".lock", out) as descriptor:
        # A command that writes `out` all at once, such as `cora merge`, holds the file next to it.
        if pids := _holder_of(_next_to(out)):
            raise _in_use(out, pids)
        for folder in (out, *(out / part for part in parts)):
            _remove_leftovers(folder)
        yield descriptor


@contextlib.contextmanager
def own_output(path: Path) -> Iterator[None]:
    """Hold a file or directory that the command writes all at once. Raises `CoraError` as `own_directory` does."""
    writing.refuse_special(path)
    _refuse_place(path)
    with _hold(_next_to(path), path):
        if path.parent.is_dir():
            _remove_leftovers(path.parent, path.name)
        yield


def _refuse_place(path: Path) -> None:
    """Raise `CoraError` for a place in the result of a run, which must stay what its training wrote, and for one whose name no record can hold."""
    place = writing.absolute(path)
    if not writing.is_storable(str(place)):
        raise CoraError(
            f"{writing.utf8(str(place))} cannot be an output, since the bytes of its name are no UTF-8, as records and libraries need it; choose another place"
        )
    for folder in (place, *place.parents):
        run = rundir.RunDirectory(folder.parent)
        if folder not in (run.adapter, run.model):
            continue
        if run.exists():
            raise CoraError(f"{path} is in {folder}, where the run {run.root} keeps its result; choose another place")
        if pids := _holder_of(run.root / ".lock"):  # a training that has not written its record yet would replace it
            raise _in_use(run.root, pids)


def is_held(out: Path) -> bool:
    """Whether a command writes into the directory `out` at this moment."""
    return _holder_of(out / ".lock") is not None


def note_holders(descriptor: int, pids: list[int]) -> None:
    """Name further processes that inherited the lock of this one."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, ", ".join(map(str, [os.getpid(), *pids])).encode(), 0)


def _next_to(path: Path) -> Path:
    path = writing.absolute(path)
    return path.with_name(f".{path.name}.lock") if path.name else path / ".lock"


@contextlib.contextmanager
def _hold(lock: Path, output: Path) -> Iterator[int]:
    created = [folder for folder in (lock.parent, *lock.parent.parents) if not folder.exists()]
    try:
        descriptor = _open_locked(lock, output)
    except OSError as error:
        raise writing.disk_error(error, output) from error
    try:
        try:
            note_holders(descriptor, [])
        except OSError as error:
            raise writing.disk_error(error, output) from error
        remove_abandoned()
        yield descriptor
    finally:
        # A full disk or a directory that disappeared must not hide the command's own error.
        with contextlib.suppress(OSError):
            if _is_at(descriptor, lock):
                lock.unlink()
        os.close(descriptor)
        with contextlib.suppress(OSError):
            for folder in created:
                folder.rmdir()


def _open_locked(lock: Path, output: Path) -> int:
    absent = 0
    while True:
        writing.make_directory(lock.parent)
        writing.refuse_special(lock)
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            absent += 1
            if absent == _MOST_ABSENT:  # such as /proc, where nothing can be created
                raise
            continue  # a holder that ended removed the empty directory
        try:
            if not _flock(descriptor, fcntl.LOCK_EX, output):
                raise _in_use(output, _noted(descriptor))
            if _is_at(descriptor, lock):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder ended and removed it meanwhile


def _flock(descriptor: int, kind: int, output: Path) -> bool:
    """Whether the lock was taken. Tries a few times, since another command may test it for a moment."""
    for _ in range(_TRIES):
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(_PAUSE_SECONDS)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            say(f"the file system of {output} has no locks ({error.strerror}); take care that no other command writes to it")
            return True
    return False


def _is_at(descriptor: int, lock: Path) -> bool:
    """Whether the open file is still the one at `lock`."""
    try:
        found = lock.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(descriptor))


def _holder_of(lock: Path) -> str | None:
    """The processes that hold `lock`; None if there are none."""
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return None if _flock(descriptor, fcntl.LOCK_SH, lock) else _noted(descriptor)
    finally:
        os.close(descriptor)


def _noted(descriptor: int) -> str:
    return os.pread(descriptor, 4096, 0).decode("utf-8", errors="replace").strip() or "unknown"


def _in_use(output: Path, pids: str) -> CoraError:
    processes = "processes" if "," in pids else "process"
    return CoraError(f"{output} is in use by another cora command ({processes} {pids}); wait until it ends, or stop it")


def _remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files of killed commands in `folder`; with `name`, only those of that output.

    Another command may be writing one output into this folder all at once; it holds the file next to it.
    """
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        found = _LEFTOVER.fullmatch(entry.name)
        if found is None or (name is not None and found["name"] != name):
            continue
        if name is None and _holder_of(_next_to(folder / found["name"])):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
