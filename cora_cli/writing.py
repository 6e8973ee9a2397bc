"""Writes files completely or not at all, and refuses places that are not to be written; the counterpart of `reading`.

A file under its final name is complete: writers use `atomic_path`.
"""

import contextlib
import errno
import json
import os
import resource
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from cora_cli.errors import CoraError
from cora_cli.reading import read_json


def absolute(path: Path) -> Path:
    """The absolute path without `..`; links stay, since in the hub's cache they lead to files without an ending."""
    return Path(os.path.abspath(path))  # noqa: PTH100  # `Path.absolute` keeps `..`, and `Path.resolve` follows links


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LINES_KEPT = "the lines before are kept"


def disk_error(error: Exception, path: Path, left: str = "no partial file was left behind") -> CoraError:
    """Turn an error from writing `path` into a one-sentence `CoraError`, which ends with what is `left` where there is no room for more."""
    said = getattr(error, "strerror", None) or error
    if is_disk_full(error):
        return CoraError(f"{what_is_full(error)}: {path} could not be written ({said}); {left}")
    return CoraError(f"{path} cannot be written: {said}")


def what_is_full(error: BaseException) -> str:
    """What leaves no room, where `is_disk_full` holds: the disk, this user's part of it, or a single file, for which torch has the same words."""
    code = error.errno if isinstance(error, OSError) else None
    too_large = "a file would be larger than `ulimit -f` or the file system allows"
    if code == errno.EFBIG or "File too large" in str(error):
        return too_large
    if code == errno.EDQUOT or "Disk quota" in str(error):
        return "the disk quota is used up"
    told = code is not None or "No space left" in str(error)
    limited = resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
    return f"the disk is full, or {too_large}" if limited and not told else "the disk is full"


def is_disk_full(error: BaseException) -> bool:
    """Whether an error means that there is no room to write; each library words this differently."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    signs = (
        "No space left",
        "File too large",
        "PytorchStreamWriter failed",
        "Disk quota",
        "inline_container",
        "iostream error",
    )
    return any(sign in str(error) for sign in signs)


@contextlib.contextmanager
def atomic_path(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary sibling of `path` that replaces it on success and vanishes on failure.

    The caller may write the sibling as a file or create it as a directory. Raises `CoraError` if the disk write fails, if `path` is a
    symbolic link, and, without `replace`, if another program created `path` meanwhile.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        refuse_special(path)
        make_directory(path.parent)
        yield temporary
        give_usual_modes(temporary)
        if path.exists():
            if not replace:
                raise CoraError(f"{path} was created by another program meanwhile; choose a new name")
            if temporary.is_dir():
                shutil.rmtree(path)
        temporary.replace(path)
    except OSError as error:
        if _is_elsewhere(error, path, temporary):
            raise
        raise disk_error(error, path) from error
    except Exception as error:
        if isinstance(error, CoraError) or not is_disk_full(error):
            raise
        raise disk_error(error, path) from error  # safetensors has its own exception
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            # A full disk must not hide the first error behind a second one.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _is_elsewhere(error: OSError, path: Path, temporary: Path) -> bool:
    """Whether an error is about another file than `path`, what becomes of it, or a directory above it: one that its writer reads."""
    if not isinstance(error.filename, str | bytes) or error.errno in _FULL:  # a copy names what it reads first
        return False
    place, wanted = absolute(Path(os.fsdecode(error.filename))), absolute(path)
    return place != wanted and place not in wanted.parents and absolute(temporary) not in (place, *place.parents)


def make_directory(path: Path) -> None:
    """Create a directory with those above it, where it does not exist. Raises `NotADirectoryError` if it is a file."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from error


def give_usual_modes(path: Path) -> None:
    """Give a file, or all files below a directory, the mode that the user's umask asks for; libraries create some as 0600."""
    mask = os.umask(0o077)
    os.umask(mask)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~mask)


def refuse_link(path: Path) -> None:
    """Raise `CoraError` if `path` is a symbolic link: what a command writes must not end up elsewhere."""
    if path.is_symlink():
        raise CoraError(
            f"{path} is a symbolic link to {path.readlink()}, and cora does not write through links; remove it, or name the place itself"
        )


def refuse_special(path: Path) -> None:
    """Raise `CoraError` if `path` is a device, a pipe or a socket, which a rename would replace by a file, and as `refuse_link` does."""
    refuse_link(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise CoraError(f"{path} is a device, a pipe or a socket, which cora does not replace by a file; choose another place")


def refuse_file(directory: Path) -> None:
    """Raise `CoraError` if `directory`, into which files are to be written, is a file."""
    if directory.exists() and not directory.is_dir():
        raise CoraError(f"output directory {directory} is a file; choose a new or empty directory")


def refuse_broken_link(path: Path) -> None:
    """Raise `CoraError` if `path` is a symbolic link that leads nowhere: its name is not one that the hub should be asked for."""
    if path.is_symlink() and not path.exists():
        raise CoraError(f"{path} is a symbolic link to {path.readlink()}, which does not exist")


@contextlib.contextmanager
def open_to_append(path: Path) -> Iterator[BinaryIO]:
    """Open a log to append to. Raises `CoraError` if it is a symbolic link, cannot be opened, or if the disk is full."""
    refuse_special(path)
    try:
        file = os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666), "ab")
    except OSError as error:
        raise disk_error(error, path) from error
    try:
        with file:
            yield file
    except OSError as error:  # the system does not name the file, and closing it fails like the write before
        if error.errno not in _FULL or error.filename is not None:
            raise
        raise disk_error(error, path, LINES_KEPT) from error


_OF_WINDOWS = ("Thumbs.db", "desktop.ini")


def holds_files(directory: Path) -> bool:
    """Whether `directory` is there and holds anything other than hidden files, which killed commands and file managers leave, and those of Windows."""

    def counts(entry: Path) -> bool:
        if not entry.name.startswith("."):
            return entry.name not in _OF_WINDOWS
        return entry.is_dir() and not entry.name.endswith((".tmp", ".lock"))

    return directory.is_dir() and any(map(counts, directory.iterdir()))


def refuse_foreign(directory: Path, names: Iterable[str], record: str) -> None:
    """Raise `CoraError` where files in `directory` have the `names` of a report to be written and are none: a report has a `record`, a file of JSON with
    its version, which is written first."""
    there = next((name for name in names if os.path.lexists(directory / name)), None)
    if there is None:
        return
    with contextlib.suppress(CoraError):
        if "format_version" in read_json(directory / record, dict[str, Any]):
            return
    raise CoraError(
        f"{directory} holds {there}, which is not of an earlier report; choose another directory, or remove the file"
    )


def own_files(folder: Path) -> list[Path]:
    """The files in `folder` without hidden ones, which file managers and network file systems leave, and those of Windows; of no folder, none."""
    found = [path for path in (folder.iterdir() if folder.is_dir() else ()) if path.is_file()]
    return [path for path in found if not path.name.startswith(".") and path.name not in _OF_WINDOWS]


def utf8(text: str) -> str:
    """`text` as UTF-8 can store it.

    Where the locale is not UTF-8, Python gives the bytes of a file name as surrogates. Here they become the characters again that the
    user typed, or escapes such as `\\xff` where they are no text.
    """
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def is_storable(name: str) -> bool:
    """Whether the bytes of a file's name are text, which records and the formats of libraries can hold."""
    try:
        name.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        return False
    return True


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically: readers see the old file or the new one, never a partial file."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(utf8(text))
        file.flush()
        os.fsync(file.fileno())


def write_together(contents: Mapping[Path, str | bytes]) -> None:
    """Write files of which, on a full disk, all or none are new; the first takes its place first.

    Raises `CoraError` as `atomic_path` does.
    """
    with contextlib.ExitStack() as all_written:
        for path, content in reversed([*contents.items()]):
            temporary = all_written.enter_context(atomic_path(path))
            with temporary.open("wb") as file:
                file.write(content if isinstance(content, bytes) else utf8(content).encode())
                file.flush()
                os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Raises `ValueError` on NaN, which JSON cannot represent."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_yaml(path: Path, value: Any) -> None:
    """Write `value` as YAML, atomically, its texts as `utf8` makes them: YAML would escape halves of characters, which no reader takes."""
    import yaml  # which `--help` does without

    write_text(path, yaml.safe_dump(_storable(value), sort_keys=False, allow_unicode=True))


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        return utf8(value)
    if isinstance(value, dict):
        return {_storable(key): _storable(entry) for key, entry in value.items()}
    return [*map(_storable, value)] if isinstance(value, list | tuple) else value


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    """Write one JSON document per line, atomically."""
    write_text(path, jsonl_text(records))


def jsonl_text(records: Iterable[Any]) -> str:
    """The content of a file with one JSON document per line."""
    return "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
