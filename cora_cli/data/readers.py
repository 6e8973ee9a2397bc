"""Read the raw records of a JSON, JSONL, CSV or Parquet file or of a hub data set, each with its place for messages.

`formats` recognises the schema of the records and checks them.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cora_cli.errors import CoraError
from cora_cli.progress import say
from cora_cli.reading import Malformed, decode_json, parse_json, read_text


def read_located(dataset: str) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) for every record of `dataset`, a file or a hub id; a place is `FILE, line N`.

    Raises `CoraError` naming the place if the file is malformed or names a key or column twice.
    """
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
    """The text of a data file with its line ends unchanged, since a quoted CSV field may contain any of them."""
    return read_text(path).removeprefix("\ufeff")


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the elements of an array, each with the line on which it starts."""
    text = _text(path)
    end = _skip(text, 0)
    if text[end : end + 1] != "[":
        raise CoraError(f"{path}, line 1: expected an array of records, found {text[end : end + 20]!r}")
    end, line, counted = _skip(text, end + 1), 1, 0
    while text[end : end + 1] != "]":
        line, counted = line + text.count("\n", counted, end), end
        try:
            record, end = decode_json(text, end)
        except Malformed as error:
            raise CoraError(f"{path}, line {error.line or line}: not valid JSON ({error})") from error
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
                yield f"{path}, line {number}", parse_json(line)
            except Malformed as error:
                raise CoraError(f"{path}, line {number}: not valid JSON ({error}): {line.strip()[:60]!r}") from error


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield rows as dictionaries by the header's names, with the line on which each starts; a quoted field may span lines.

    Columns without a name are left out: the first one, where pandas writes its index, and empty ones, such as those of a spreadsheet.
    """
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    header: list[str] = []
    unnamed: set[int] = set()
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            row = next(reader)
        except StopIteration:
            if unnamed:
                say(f"{path}: columns without a name are left out ({', '.join(str(place + 1) for place in sorted(unnamed))})")
            return
        except csv.Error as error:
            raise CoraError(f"{where}: not valid CSV ({error})") from error
        if row and not header:
            header = row
            unnamed = {place for place, name in enumerate(header) if not name.strip()}
            _check_header([name for place, name in enumerate(header) if place not in unnamed], where)
        elif row:
            if len(row) < len(header) or any(cell.strip() for cell in row[len(header) :]):
                raise CoraError(f"{where}: the row has {len(row)} columns, but the header has {len(header)}")
            unnamed |= set(range(len(header), len(row)))
            if lost := next((place for place in sorted(unnamed) if 0 < place < len(row) and row[place].strip()), None):
                raise CoraError(
                    f"{where}: column {lost + 1} has no name but holds {row[lost][:40]!r}; name it in the header, or quote text with commas"
                )
            yield (
                where,
                {name: cell for place, (name, cell) in enumerate(zip(header, row, strict=False)) if place not in unnamed},
            )


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        _check_header(pyarrow.parquet.read_schema(path).names, str(path))
        rows = pyarrow.parquet.read_table(path).to_pylist(maps_as_pydicts="strict")
    except (
        pyarrow.ArrowException,
        OSError,
        LookupError,
        ValueError,
        TypeError,
    ) as error:  # such as a struct that names a field twice
        raise CoraError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", _without_nulls(row)


def _read_hub(dataset: str) -> Iterator[tuple[str, Any]]:
    import datasets

    name, _, revision = dataset.partition("@")
    try:
        rows = datasets.load_dataset(name, revision=revision or None, split="train")
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CoraError(f"dataset {dataset!r} is not a local file and could not be loaded from the hub: {reason}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{dataset}, record {number}", _without_nulls(row)


def _check_header(columns: Sequence[str], where: str) -> None:
    repeated = next((name for name, count in Counter(columns).items() if count > 1), None)
    if repeated is not None:
        raise CoraError(f"{where}: two columns are named {repeated!r}; rename or remove one of them")


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row of an Arrow table without the nulls inside its nested values.

    Arrow gives every object of a column the keys of all the others, with null for those it does not have.
    """

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(one) for key, one in value.items() if one is not None}
        return [strip(one) for one in value] if isinstance(value, list) else value

    return {name: strip(value) for name, value in row.items()}
