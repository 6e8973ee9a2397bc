"""File names, atomic writes and content hashes of everything `cora` writes to disk.

A file under its final name is complete: writers use `atomic_path`, and readers verify hashes. This module does not depend on
any command; from the package it imports only `errors` and `reading`.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from cora_cli.errors import CoraError
from cora_cli.reading import read_json

HASH_CHUNK = 1 << 20
COMPACT_ADAPTER = "adapter_a_only.safetensors"
"""The weights of an adapter in compact form: only A, because B can be recomputed from a basis file or a seed."""
POSTERIOR = "posterior.safetensors"
"""The file of an adapter that says how far its weights can be from those that it stores; see `adapters.posterior`."""
CARD = "README.md"
"""The model card next to weights. No recorded hash covers it, since people edit it."""
_SHA256_NAME = re.compile(r"^[0-9a-f]{64}$")


def absolute(path: Path) -> Path:
    """The absolute path without `..`; links stay, since in the hub's cache they lead to files without an ending."""
    return Path(os.path.abspath(path))  # noqa: PTH100  # `Path.absolute` keeps `..`, and `Path.resolve` follows links


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LINES_KEPT = "the lines before are kept"


def disk_error(error: OSError, path: Path, left: str = "no partial file was left behind") -> CoraError:
    """Turn an operating system error from writing `path` into a one-sentence `CoraError`, which ends with what is `left` where the disk is full."""
    if error.errno in _FULL:
        return CoraError(f"the disk is full: {path} could not be written ({error.strerror}); {left}")
    return CoraError(f"{path} cannot be written: {error.strerror or error}")


def is_disk_full(error: BaseException) -> bool:
    """Whether an error means that the disk is full; each library words this differently."""
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
        if isinstance(error, CoraError) or "No space left" not in str(error):
            raise
        raise disk_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), path) from error  # safetensors has its own exception
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


def require_basis(path: Path) -> None:
    """Raise `CoraError` if there is no basis file at `path`."""
    if path.is_dir():
        raise CoraError(f"basis {path} is a directory; name the file that `cora extract-basis` wrote")
    if not path.is_file():
        raise CoraError(f"basis {path} does not exist; create one with `cora extract-basis`")


_OF_WINDOWS = ("Thumbs.db", "desktop.ini")


def holds_files(directory: Path) -> bool:
    """Whether `directory` holds anything other than hidden files, which killed commands and file managers leave, and those of Windows."""

    def counts(entry: Path) -> bool:
        if not entry.name.startswith("."):
            return entry.name not in _OF_WINDOWS
        return entry.is_dir() and not entry.name.endswith((".tmp", ".lock"))

    return any(map(counts, directory.iterdir()))


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


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically: readers see the old file or the new one, never a partial file."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(utf8(text))
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Raises `ValueError` on NaN, which JSON cannot represent."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    """Write one JSON document per line, atomically."""
    write_text(path, jsonl_text(records))


def jsonl_text(records: Iterable[Any]) -> str:
    """The content of a file with one JSON document per line."""
    return "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)


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
    hashing does not have to read 26 GB of weights.
    """
    if path.is_symlink() and _SHA256_NAME.match((blob := path.resolve()).name) and _is_hub_blob(blob):
        return blob.name
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


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


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """The path of each file of a training run. Constructing one does not touch the disk."""

    root: Path

    @cached_property
    def config(self) -> Path:
        """The resolved configuration, YAML, readable by `cora train --config`."""
        return self.root / "config.yaml"

    @cached_property
    def record(self) -> Path:
        """`run.json`: versions, seeds, hashes, counts, speed, status."""
        return self.root / "run.json"

    @cached_property
    def log(self) -> Path:
        """`log.jsonl`: one line per optimizer step."""
        return self.root / "log.jsonl"

    @cached_property
    def adapter(self) -> Path:
        """A standard PEFT adapter directory (mode `full`: absent, see `model`)."""
        return self.root / "adapter"

    @cached_property
    def model(self) -> Path:
        """The complete model, written by mode `full` only."""
        return self.root / "model"

    @cached_property
    def checkpoints(self) -> Path:
        """The Trainer's checkpoints; each is renamed into place once it is complete."""
        return self.root / "checkpoints"

    @cached_property
    def test_records(self) -> Path:
        """`test.jsonl`: the held-out records, never trained on."""
        return self.root / "test.jsonl"

    @cached_property
    def trained_prompts(self) -> Path:
        """`trained_prompts.txt`: a hash of each prompt that was trained on, one per line."""
        return self.root / "trained_prompts.txt"

    @cached_property
    def heldout(self) -> Path:
        """`heldout.jsonl`: the token count of each held-out record and its negative log-likelihood before and after training."""
        return self.root / "heldout.jsonl"

    def stop(self, step: int) -> Path:
        """`stops/<step>.json`: the validation loss at which `--stop-at` left the run."""
        return self.root / "stops" / f"{step}.json"

    @cached_property
    def evaluation(self) -> Path:
        """Default output directory of `cora evaluate RUN`."""
        return self.root / "eval"

    @property
    def base_evaluation(self) -> Path:
        """Where `cora evaluate RUN --with-base` evaluates the base model."""
        return self.root / "eval-base"

    def evaluations_at_ranks(self) -> list[Path]:
        """The scored evaluations of `cora evaluate RUN --ranks …`, eval-rank-1, eval-rank-2, …, by rank."""
        start = f"{self.evaluation.name}-rank-"
        found = {int(rank): path for path in self.root.glob(f"{start}*") if (rank := path.name.removeprefix(start)).isdecimal()}
        return [found[rank] for rank in sorted(found) if EvaluationDirectory(found[rank]).metrics.is_file()]

    @cached_property
    def sums(self) -> Path:
        """`SHA256SUMS`: the hash of every file of a run that `cora publish` uploaded, in the format of `sha256sum`."""
        return self.root / "SHA256SUMS"

    def exists(self) -> bool:
        """Whether this directory holds a run, complete or not."""
        return self.record.exists()

    @property
    def result(self) -> Path:
        """What the run trained: `model/` in mode `full`, else `adapter/`; of a published run, the directory itself holds its files."""
        if self.model.exists():
            return self.model
        return self.root if self.sums.exists() and not self.adapter.exists() else self.adapter

    def result_files(self) -> dict[str, str]:
        """SHA-256 of each file of the result except its card, by name; of none where there is no result."""
        result = self.result
        if result == self.root:  # next to other files
            paths = [result / name for name in read_json(self.record, dict[str, Any]).get("result_files", {})]
        else:
            paths = sorted(own_files(result))
        return {path.name: sha256_file(path) for path in paths if path.is_file() and path.name != CARD}

    def result_hash(self) -> str:
        """SHA-256 over the files of the result except its card; of no files where there is none."""
        return sha256_json(self.result_files())

    def check_result(self) -> None:
        """Raise `CoraError`, with the file where that is known, unless the run is finished and the result is the one whose hash it recorded.

        The result of a run that is being completed again is the damaged one until the end.
        """
        record = read_json(self.record, dict[str, Any])
        if (status := record.get("status", "finished")) != "finished":
            raise CoraError(
                f"{self.root} is not finished (status {status}); complete it with the same `cora train` command and --resume"
            )
        expected, found = record.get("result_sha256"), self.result_files()
        if expected is None:
            return
        if expected == sha256_json(found):
            self._check_seed(record)
            return
        known = record.get("result_files") or found
        if "result_files" in record and (added := sorted(found.keys() - known)) and known.items() <= found.items():
            raise CoraError(
                f"{self.result / added[0]} was put next to the result of a finished run and is no part of it; move it out of {self.result}"
            )
        changed = [name for name in sorted({*known, *found}) if known.get(name) != found.get(name)]
        raise CoraError(
            f"{self.result / changed[0] if changed else self.result} was changed after its training had finished: it does not have the hash in "
            f"{self.record}; restore it, or write it again with the same `cora train` command and --resume"
        )

    def _check_seed(self, record: Mapping[str, Any]) -> None:
        """Raise `CoraError` if the record states another seed than the adapter, whose files it has the hashes of: it would feign a second seed."""
        details = self.result / "cora.json"
        if "laplace" in record or not details.is_file():
            return
        plan = read_json(details, dict[str, Any]).get("plan")
        stated, trained = (each.get("seed") if isinstance(each, dict) else None for each in (record.get("seeds"), plan))
        if None not in (stated, trained) and stated != trained:
            raise CoraError(
                f"{self.record} was changed after its training had finished: it states the seed {stated}, but {details} the seed {trained}; restore it"
            )


@dataclasses.dataclass(frozen=True)
class EvaluationDirectory:
    """The path of each file of an evaluation."""

    root: Path

    @cached_property
    def predictions(self) -> Path:
        """One line per example in dataset order: index, prompt, reference, prediction, finish_reason, new_tokens."""
        return self.root / "predictions.jsonl"

    @cached_property
    def partial_predictions(self) -> Path:
        """The same lines in the order of generation, present while generation is running."""
        return self.root / "predictions.partial.jsonl"

    @cached_property
    def generation(self) -> Path:
        """`generation.json`: the settings and inputs of the predictions, and their hash once they are complete."""
        return self.root / "generation.json"

    @cached_property
    def metrics(self) -> Path:
        """`metrics.json`: under `metrics`, the `value`, `ci95`, `n` and `signature` of each metric."""
        return self.root / "metrics.json"

    @cached_property
    def scores(self) -> Path:
        """`scores.jsonl`: per-example score of each metric, in dataset order."""
        return self.root / "scores.jsonl"

    @cached_property
    def executions(self) -> Path:
        """`executions.jsonl`: per record the time limit and the fate of each of its programs, where generated code was run."""
        return self.root / "executions.jsonl"


@dataclasses.dataclass(frozen=True)
class JudgeDirectory:
    """The path of each file of a judging."""

    root: Path

    @cached_property
    def judgments(self) -> Path:
        """`judgments.jsonl`: one line for each outcome of a request, appended as it comes; never rewritten, since it may have been paid for."""
        return self.root / "judgments.jsonl"

    @cached_property
    def result(self) -> Path:
        """`judge.json`: scores, preferences and what the anchors say about the judge."""
        return self.root / "judge.json"
