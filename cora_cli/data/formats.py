"""Read records from a built-in set, a local JSON, JSONL, CSV or Parquet file, or a hub id, and split off the held-out part.

A record stays a plain dictionary in one of three schemas, recognised by its columns. `templates` turns records into text,
`encode` into tokens.
"""

import csv
import dataclasses
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cora_cli import rundir
from cora_cli.errors import CoraError, UsageError

if TYPE_CHECKING:
    from cora_cli.data.builtin import BuiltinSplit

Record = dict[str, Any]
Schema = Literal["alpaca", "prompt", "messages"]
BUILTIN_PREFIX = "builtin:"
SCHEMAS: dict[Schema, tuple[str, ...]] = {
    "alpaca": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
    "messages": ("messages",),
}


@dataclasses.dataclass(frozen=True)
class DataSplit:
    """Training and held-out records of one data set; no held-out prompt occurs in `train`.

    `validation` holds the records for selecting settings; their prompts do not occur in the other two. `overlapping` counts the
    training records that were dropped because their prompt also occurs in `test` or `validation`.
    """

    train: list[Record]
    test: list[Record]
    schema: Schema
    overlapping: int = 0
    validation: list[Record] = dataclasses.field(default_factory=list)

    def content_hash(self) -> str:
        """SHA-256 of all records in their order."""
        return rundir.sha256_json([self.train, self.test, *([self.validation] if self.validation else [])])


def schema_of(columns: set[str], where: str) -> Schema:
    """Recognise a schema by its columns. Raises a `CoraError` that names the columns found and those needed."""
    for schema, needed in SCHEMAS.items():
        if columns >= set(needed):
            return schema
    found = ", ".join(sorted(columns)) or "none"
    raise CoraError(
        f"{where}: found the columns {found}; a record needs instruction, output (and input), or prompt, completion, "
        f"or messages"
    )


def prompt_key(record: Record, schema: Schema) -> str:
    """A key that identifies a record's prompt, independent of its answer and its other columns."""
    if schema == "messages":
        return json.dumps(record["messages"][:-1], sort_keys=True, ensure_ascii=False)
    if schema == "prompt":
        return str(record["prompt"])
    return json.dumps([record["instruction"], record["input"]], ensure_ascii=False)


def load_records(dataset: str) -> tuple[list[Record], Schema]:
    """Read and check every record of `dataset` (for a built-in set: its held-out part after its training part).

    Raises `CoraError` naming the file and line of the first malformed record.
    """
    if dataset.startswith(BUILTIN_PREFIX):
        split = _builtin(dataset)
        return [*split.train, *split.test], "alpaca"
    located = list(_read(dataset))
    if not located:
        raise CoraError(f"{dataset} holds no records")
    schema = schema_of(_columns(*located[0]), located[0][0])
    return [_checked(record, schema, where) for where, record in located], schema


def load_test_records(dataset: str) -> tuple[list[Record], Schema]:
    """Read the records to evaluate on: a built-in set's held-out part, or every record of a file."""
    if dataset.startswith(BUILTIN_PREFIX):
        return _builtin(dataset).test, "alpaca"
    return load_records(dataset)


def load_split(dataset: str, test_size: float | None, seed: int, validation_size: int | None = None) -> DataSplit:
    """Read `dataset` and hold out `test_size` records: a count if at least 1, a share if below 1, None for the set's own split.

    A data set without its own split holds out a tenth. `validation_size` of the remaining records are set aside for selecting
    settings. The held-out records depend only on `seed`, the validation records on `seed` and the held-out ones.
    Raises `CoraError` if no records would remain to train on.
    """
    split = _split(dataset, test_size, seed)
    return _split_validation(split, validation_size, seed, dataset) if validation_size else split


def _split_validation(split: DataSplit, count: int, seed: int, dataset: str) -> DataSplit:
    if count >= len(split.train):
        raise CoraError(
            f"{dataset} has {len(split.train)} training records, so {count} for validation leave none to train on; use fewer"
        )
    chosen = sorted(random.Random(f"validation {seed}").sample(range(len(split.train)), count))
    validation = [split.train[index] for index in chosen]
    known = {prompt_key(record, split.schema) for record in validation}
    train = [record for record in split.train if prompt_key(record, split.schema) not in known]
    if not train:
        raise CoraError(
            f"{dataset}: every training prompt also occurs in the validation records, which leaves none to train on"
        )
    overlapping = split.overlapping + len(split.train) - len(validation) - len(train)
    return dataclasses.replace(split, train=train, validation=validation, overlapping=overlapping)


def _split(dataset: str, test_size: float | None, seed: int) -> DataSplit:
    if test_size is not None and not (0 <= test_size < 1 or (test_size >= 1 and float(test_size).is_integer())):
        raise UsageError(f"--test-size must be a count, or a share between 0 and 1, not {test_size}")
    if dataset.startswith(BUILTIN_PREFIX) and test_size is None:
        split = _builtin(dataset)
        return DataSplit(split.train, split.test, "alpaca")
    records, schema = load_records(dataset)
    size = 0.1 if test_size is None else test_size
    count = int(size) if size >= 1 else round(size * len(records))
    if count >= len(records):
        raise CoraError(
            f"{dataset} holds {len(records)} records, so holding out {count} leaves none to train on; use a smaller --test-size"
        )
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    test = [records[index] for index in sorted(order[:count])]
    held_out = {prompt_key(record, schema) for record in test}
    rest = [records[index] for index in sorted(order[count:])]
    train = [record for record in rest if prompt_key(record, schema) not in held_out]
    if not train:
        raise CoraError(f"{dataset}: every training prompt also occurs in the held-out records, which leaves none to train on")
    return DataSplit(train, test, schema, overlapping=len(rest) - len(train))


def _builtin(dataset: str) -> "BuiltinSplit":
    from cora_cli.data.builtin import load_builtin

    return load_builtin(dataset.removeprefix(BUILTIN_PREFIX))


def _read(dataset: str) -> Iterator[tuple[str, Any]]:
    path = Path(dataset).expanduser()
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.is_file():
        reader = readers.get(path.suffix.lower())
        if reader is None:
            raise CoraError(f"{dataset} has the ending {path.suffix or '(none)'}; supported endings are {', '.join(readers)}")
        return reader(path)
    # The hub client would silently load a directory of that name.
    if path.is_dir() or path.suffix.lower() in readers or path.is_absolute() or dataset.startswith((".", "~")):
        raise CoraError(f"dataset {dataset} {'is a directory, not a file' if path.is_dir() else 'does not exist'}")
    return _read_hub(dataset)


def _text(path: Path) -> str:
    try:
        # Keep line ends unchanged: a quoted CSV field may contain any of them.
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise CoraError(f"{path} is not UTF-8 text: {error}") from error


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the elements of an array, each with the line on which it starts."""
    text, decoder = _text(path), json.JSONDecoder()
    end = _skip(text, 0)
    if text[end : end + 1] != "[":
        raise CoraError(f"{path}, line 1: expected an array of records, found {text[end : end + 20]!r}")
    end, line, counted = _skip(text, end + 1), 1, 0
    while text[end : end + 1] != "]":
        line, counted = line + text.count("\n", counted, end), end
        try:
            record, end = decoder.raw_decode(text, end)
        except json.JSONDecodeError as error:
            raise CoraError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
        yield f"{path}, line {line}", record
        end = _skip(text, end)
        if text[end : end + 1] not in (",", "]"):
            line += text.count("\n", counted, end)
            raise CoraError(f"{path}, line {line}: not valid JSON (',' or ']' expected, found {text[end : end + 20]!r})")
        if text[end] == ",":
            end = _skip(text, end + 1)
    rest = _skip(text, end + 1)
    if rest < len(text):
        line += text.count("\n", counted, rest)
        raise CoraError(f"{path}, line {line}: not valid JSON (nothing may follow the array, found {text[rest : rest + 20]!r})")


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise CoraError(f"{path}, line {number}: not valid JSON ({error.msg}): {line.strip()[:60]!r}") from error


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield rows as dictionaries by the header's names, with the line on which each starts; a quoted field may span lines."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    header: list[str] = []
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise CoraError(f"{where}: not valid CSV ({error})") from error
        if row and not header:
            header = row
        elif row:
            if len(row) != len(header):
                raise CoraError(f"{where}: the row has {len(row)} columns, but the header has {len(header)}")
            yield where, dict(zip(header, row, strict=True))


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise CoraError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _read_hub(dataset: str) -> Iterator[tuple[str, Any]]:
    import datasets

    name, _, revision = dataset.partition("@")
    try:
        rows = datasets.load_dataset(name, revision=revision or None, split="train")
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CoraError(f"dataset {dataset!r} is not a local file and could not be loaded from the hub: {reason}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{dataset}, record {number}", row


def _columns(where: str, record: Any) -> set[str]:
    if not isinstance(record, dict):
        raise CoraError(f"{where}: expected a record with named columns, found {json.dumps(record)[:60]}")
    return set(record)


def _checked(record: Any, schema: Schema, where: str) -> Record:
    columns = _columns(where, record)
    if missing := [name for name in SCHEMAS[schema] if name not in columns]:
        found = ", ".join(sorted(columns)) or "none"
        raise CoraError(f"{where}: column {', '.join(missing)} is missing; found {found}")
    checked = {name: value for name, value in record.items() if name in SCHEMAS[schema] or _is_json(value)}
    if schema == "messages":
        _check_messages(record["messages"], where)
        return checked
    texts = SCHEMAS[schema]
    if schema == "alpaca":
        given = record.get("input")
        checked["input"] = "" if given is None else given
        texts = (*texts, "input")
    for name in texts:
        if not isinstance(checked[name], str) or not _is_json(checked[name]):
            raise CoraError(f"{where}: {name} must be text, not {json.dumps(checked[name], default=str)[:60]}")
    return checked


def _is_json(value: Any) -> bool:
    """Whether JSON can store a value: a date, NaN or half of an escaped surrogate pair cannot be stored."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError):
        return False
    return True


def _check_messages(messages: Any, where: str) -> None:
    shape_ok = isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    )
    if not shape_ok or len(messages) < 2 or messages[-1]["role"] != "assistant" or not _is_json(messages):
        raise CoraError(
            f"{where}: messages must be a list of {{role, content}} that ends with the assistant's answer, not "
            f"{json.dumps(messages, default=str)[:120]}"
        )
