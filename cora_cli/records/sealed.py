"""Records with a hash of their own contents: one that was changed after it was written is damaged, and never believed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cora_cli import hashing, writing
from cora_cli.errors import CoraError
from cora_cli.reading import read_json

_HASH = "sha256"


def write_sealed(path: Path, record: Mapping[str, Any]) -> None:
    """Write `record` with the hash of its contents."""
    writing.write_json(path, sealed(record))


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """`record` with the hash of its contents."""
    as_read = json.loads(json.dumps(record))  # where every key is text
    return {**record, _HASH: hashing.sha256_json(as_read)}


def read_sealed(path: Path, shape: Any = dict[str, Any], *, remedy: str = "; restore it") -> dict[str, Any]:
    """The record in `path`, as it was written; earlier versions wrote no hash.

    Raises `CoraError` if the file is missing, does not have the `shape`, or was changed since; the last with the `remedy`.
    """
    record: dict[str, Any] = read_json(path, shape)
    written = record.pop(_HASH, None)
    if written is not None and written != hashing.sha256_json(record):
        raise CoraError(f"{path} was changed after it was written{remedy}")
    return record
