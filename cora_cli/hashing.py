"""Hashes of files, texts, values and tensors, by which readers know that what they read is what was written."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cora_cli.errors import CoraError

HASH_CHUNK = 1 << 20
_SHA256_NAME = re.compile(r"^[0-9a-f]{64}$")


def sha256_bytes(content: bytes) -> str:
    """Hex digest of bytes."""
    return hashlib.sha256(content).hexdigest()


def sha256_text(text: str) -> str:
    """Hex digest of a string's UTF-8 bytes; bytes of a file name that are not text enter as they are."""
    return sha256_bytes(text.encode("utf-8", "surrogateescape"))


def tensor_digest(name: str, tensor: Any) -> str:
    """SHA-256 over name, type, shape and bytes of a CPU tensor."""
    import torch  # imported here because every caller has already loaded torch

    digest = hashlib.sha256(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex digest of a JSON-serialisable value, independent of key order."""
    return sha256_text(json.dumps(value, sort_keys=True, ensure_ascii=False))


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes.

    A file in the hub's cache is a link to a blob whose name is its digest. That name is returned without reading the file, so
    hashing does not have to read 26 GB of weights. Raises `CoraError` if the file cannot be read.
    """
    if path.is_symlink() and _SHA256_NAME.match((blob := path.resolve()).name) and _is_hub_blob(blob):
        return blob.name
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(HASH_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise CoraError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def begins_as(path: Path, sha256: str) -> bool:
    """Whether the file, to which lines may have been added since, has this hash up to the end of one of its lines.

    Raises `CoraError` if the file cannot be read.
    """
    so_far = hashlib.sha256()
    try:
        with path.open("rb") as file:
            for line in file:
                if so_far.hexdigest() == sha256:
                    return True
                so_far.update(line)
    except OSError as error:
        raise CoraError(f"{path} cannot be read: {error.strerror or error}") from error
    return so_far.hexdigest() == sha256


def _is_hub_blob(path: Path) -> bool:
    """Whether a file lies among the blobs of the hub's own cache; elsewhere a name that looks like a hash proves nothing."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return path.parent.name == "blobs" and Path(HF_HUB_CACHE).resolve() in path.parents


def file_state(path: Path) -> tuple[int, ...] | None:
    """What differs after a file was replaced or written to; None where there is none. Much cheaper than a hash.

    Without the number of the inode, which file systems of FUSE may give anew to the same file.
    """
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def unchanged(*paths: Path) -> Iterator[None]:
    """Raise `CoraError` if a file is replaced or written to in the block, which reads it more than once."""
    before = [file_state(path) for path in paths]
    yield
    for path, state in zip(paths, before, strict=True):
        if file_state(path) != state:
            raise changed_meanwhile(path)


def changed_meanwhile(path: Path) -> CoraError:
    """The error for a file that another program wrote to between two readings: what was computed would not belong to what is recorded."""
    return CoraError(
        f"{path} was changed while this command was using it; start it again when no other program writes to {path.parent}"
    )


def sha256_files(paths: Iterable[Path]) -> str:
    """Hex digest over the names and contents of several files, independent of their order and their directories."""
    return sha256_json({path.name: sha256_file(path) for path in paths})
