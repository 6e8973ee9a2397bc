"""The embeddings of a set of references on disk, because every evaluation of an experiment compares with the same references.

A file holds the float32 embeddings of all texts one after the other, and their SHA-256. Its name is the hash of everything that determines
them. A file that is missing, damaged or cannot be written costs time, but changes no score.
"""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from cora_cli import writing
from cora_cli.embedded import cache_directory
from cora_cli.errors import CoraError

# Larger sets are not kept: 128 MiB are about 1,400 references of 60 tokens with 384 numbers each.
LARGEST_BYTES = 1 << 27
# All files together; those that were used longest ago are deleted first.
MOST_BYTES = 1 << 29
_FOLDER, _SUFFIX = "reference-embeddings-v1", ".f32"
_DIGEST_BYTES = hashlib.sha256().digest_size


def directory() -> Path:
    """The folder of the files, in the user's cache."""
    return cache_directory() / _FOLDER


def fits(lengths: Sequence[int], width: int) -> bool:
    """Whether embeddings of texts of these `lengths` in tokens, with `width` numbers a token, are kept."""
    return 4 * width * sum(lengths) <= LARGEST_BYTES


def read(key: str, lengths: Sequence[int], width: int) -> list[torch.Tensor] | None:
    """The embeddings (tokens, width) of each text on the CPU; None if there is no complete, unchanged file under `key`."""
    path = directory() / f"{key}{_SUFFIX}"
    try:
        content = bytearray(path.read_bytes())
        os.utime(path)  # it was used now
    except OSError:
        return None
    values = memoryview(content)[:-_DIGEST_BYTES]
    if len(values) != 4 * width * sum(lengths) or hashlib.sha256(values).digest() != content[-_DIGEST_BYTES:]:
        return None
    return list(torch.frombuffer(values, dtype=torch.float32).view(-1, width).split(list(lengths)))


def write(key: str, embeddings: Sequence[torch.Tensor]) -> None:
    """Keep the embeddings (tokens, width) of each text under `key`, if the cache can be written."""
    values = torch.cat([one.cpu() for one in embeddings]).numpy().tobytes()
    with contextlib.suppress(CoraError, OSError):
        with writing.atomic_path(directory() / f"{key}{_SUFFIX}") as temporary, temporary.open("wb") as file:
            file.write(values)
            file.write(hashlib.sha256(values).digest())
            file.flush()
            os.fsync(file.fileno())
        _delete_oldest()


def _delete_oldest() -> None:
    found = sorted(((path.stat(), path) for path in directory().glob(f"*{_SUFFIX}")), key=lambda file: -file[0].st_mtime_ns)
    total = 0
    for stat, path in found:
        total += stat.st_size
        if total > MOST_BYTES:
            path.unlink(missing_ok=True)
