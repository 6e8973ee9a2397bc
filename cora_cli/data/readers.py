"""Read the raw records of a JSON, JSONL, CSV, TSV or Parquet file, a folder of `save_to_disk` or a hub data set, each with its place for messages.

`formats` recognises the schema of the records and checks them.
"""

import csv
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from cora_cli.data.tables import HELD_OUT, check_header, one_of, read_folder, read_hub, read_parquet
from cora_cli.data.texts import COMPRESSIONS, text_of
from cora_cli.errors import CoraError
from cora_cli.progress import note
from cora_cli.reading import Malformed, decode_json, parse_json, refuse_pointer
from cora_cli.writing import refuse_broken_link

_AROUND_NAMES = '\ufeff" '
"""What stands around a name in a header that is no longer the first row: the mark of a file's encoding, and quotes behind it."""


def read_located(
    dataset: str, subset: str | None = None, split: str | None = None, usual: str = "train"
) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) for every record of `dataset`: a file, a folder of `save_to_disk`, or a hub id; a place is `FILE, line N`.

    `subset` is a configuration of a hub data set, `split` one of the splits of a data set that has several, in which `usual` is taken
    without it. Raises `CoraError` naming the place if the file is malformed or names a key or column twice.
    """
    path = Path(dataset).expanduser()
    ending = _ending(path)
    if subset is not None and _is_local(dataset):
        raise CoraError(f"--subset {subset} applies to data sets of the hub, which {dataset} is not; leave it out")
    if path.is_file():
        if ending not in _READERS:
            raise CoraError(
                f"{dataset} has the ending {path.suffix or '(none)'}; supported endings are {', '.join(_READERS)}, all but .parquet also with "
                f"{', '.join(COMPRESSIONS)}"
            )
        refuse_pointer(path)
        if ending == ".json":
            return _read_json(path, split, usual)
        if split is not None:
            raise CoraError(f"--split {split} applies to data sets with several splits, which {dataset} is not; leave it out")
        return _READERS[ending](path)
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        return read_folder(path, split, usual)
    check_place(dataset)
    # The hub client would silently load a directory of that name.
    if path.exists():
        if not path.is_dir():
            raise CoraError(
                f"dataset {dataset} is a device or a pipe, which can be read only once; write the records to a file first"
            )
        raise CoraError(
            f"dataset {dataset} is a directory, not a file or a folder of datasets.save_to_disk; name one of its files, or write such a folder of "
            f"them all: datasets.load_dataset({dataset!r}).save_to_disk('NEW')"
        )
    return read_hub(dataset, subset, split or usual)


def check_place(dataset: str) -> None:
    """Raise `CoraError` for a file that does not exist; a name that the hub could have passes."""
    refuse_broken_link(Path(dataset).expanduser())
    if _is_local(dataset) and not Path(dataset).expanduser().exists():
        raise CoraError(f"dataset {dataset} does not exist")


def _is_local(dataset: str) -> bool:
    path = Path(dataset).expanduser()
    return path.exists() or _ending(path) in _READERS or path.is_absolute() or dataset.startswith((".", "~"))


def _ending(path: Path) -> str:
    """The ending of a file's name that says how to read it, without that of its compression."""
    inner = path.with_suffix("").suffix.lower()
    return inner if path.suffix.lower() in COMPRESSIONS and inner != ".parquet" else path.suffix.lower()


def _read_json(path: Path, split: str | None, usual: str) -> Iterator[tuple[str, Any]]:
    """Yield the elements of an array, each with the line on which it starts; see `_read_object` for an object with arrays."""
    text = text_of(path)
    end = _skip(text, 0)
    if text[end : end + 1] == "{":
        yield from _read_object(path, text, split, usual)
        return
    if split is not None:
        raise CoraError(f"--split {split} applies to data sets with several splits, which {path} is not; leave it out")
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


def _read_object(path: Path, text: str, split: str | None, usual: str) -> Iterator[tuple[str, Any]]:
    """Yield the records of an object with one array of them, such as `{"data": [...]}`, or with one for each split."""
    try:
        value = parse_json(text)
    except Malformed as error:
        remedy = "a file with one record per line has the ending .jsonl"
        if text.lstrip().startswith(("{\n", "{\r")):
            remedy = "objects that follow each other become one array by `jq -s . OLD > NEW`"
        raise CoraError(f"{path}, line {error.line or 1}: not valid JSON ({error}); {remedy}") from error
    arrays = {key: rows for key, rows in value.items() if isinstance(rows, list) and all(isinstance(row, dict) for row in rows)}
    is_record = any(value.keys() >= {name} for name in ("messages", "conversations"))
    if not arrays or is_record:
        is_table = all(isinstance(column, dict | list) for column in value.values()) and not is_record
        advice = "; pandas writes one with DataFrame.to_json(FILE, orient='records')" if value and is_table else ""
        raise CoraError(f"{path}, line 1: expected an array of records, found {text.lstrip()[:20]!r}{advice}")
    # Arrays need not be splits, so none is taken without being named; --test-dataset names the split test.
    key = one_of(arrays, split, usual if usual == HELD_OUT else None, str(path))
    for number, row in enumerate(arrays[key], start=1):
        yield f"{path}, {key}, record {number}", row


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text_of(path).split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path}, line {number}", parse_json(line)
            except Malformed as error:
                opens = (
                    "; a record takes one line here, as `jq -c . OLD > NEW` writes it; an array of records has the ending .json"
                )
                hint = opens if line.strip() in ("[", "{", "[{") else ""
                raise CoraError(f"{path}, line {number}: not valid JSON ({error}): {line.strip()[:60]!r}{hint}") from error


def _read_csv(path: Path, delimiter: str = ",", quoting: Literal[0, 3] = csv.QUOTE_MINIMAL) -> Iterator[tuple[str, Any]]:
    """Yield rows as dictionaries by the header's names, with the line on which each starts; a quoted field may span lines.

    Columns without a name are left out: the first one, where pandas writes its index, and empty ones, such as those of a spreadsheet.
    So are rows of empty cells, which spreadsheets write around a table.
    """
    # Excel's line that names the delimiter is no header, and PowerShell's that names the type of the rows neither.
    no_header = rf'\A\ufeff?("?sep={delimiter}"?|#TYPE [\w.]+)(?=[\r\n])'
    text = re.sub(no_header, "", text_of(path), flags=re.IGNORECASE)
    reader = _rows(text, delimiter, quoting)
    header: list[str] = []
    unnamed: set[int] = set()
    empty = 0
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            row = next(reader)
        except StopIteration:
            if unnamed:
                note(f"{path}: columns without a name are left out ({', '.join(str(place + 1) for place in sorted(unnamed))})")
            if empty:
                note(f"{path}: {empty:,} row{'s' if empty > 1 else ''} of empty cells left out")
            return
        except csv.Error as error:
            raise CoraError(
                f"{where}: not valid {'CSV' if delimiter == ',' else 'TSV'} ({error}); a text that holds a quotation mark stands in quotes, and the mark "
                "in it is doubled"
            ) from error
        if not any(cell.strip() for cell in row):
            empty += bool(row)
        elif not header:
            header = row
            if len(row) == 1 and any(mark in row[0] for mark in ",;\t|" if mark != delimiter):
                raise CoraError(
                    f"{where}: the header is one column, {row[0][:60]!r}; separate the columns by {'commas' if delimiter == ',' else 'tabs'}, as the "
                    "file's ending says"
                )
            unnamed = {place for place, name in enumerate(header) if not name.strip()}
            check_header([name for place, name in enumerate(header) if place not in unnamed], where)
        else:
            if [cell.strip(_AROUND_NAMES) for cell in row] == [name.strip(_AROUND_NAMES) for name in header]:
                raise CoraError(f"{where}: the row repeats the header, as in files put one after the other; remove it")
            if len(row) < len(header) or any(cell.strip() for cell in row[len(header) :]):
                spaced = any(cell.startswith(' "') for cell in row)
                remedy = "; quotes around a field begin right behind the delimiter, without a space" if spaced else ""
                columns = "1 column" if len(row) == 1 else f"{len(row)} columns"
                raise CoraError(f"{where}: the row has {columns}, but the header has {len(header)}{remedy}")
            unnamed |= set(range(len(header), len(row)))
            if lost := next((place for place in sorted(unnamed) if 0 < place < len(row) and row[place].strip()), None):
                raise CoraError(
                    f"{where}: column {lost + 1} has no name but holds {row[lost][:40]!r}; name it in the header, or quote text with commas"
                )
            yield (
                where,
                {name: cell for place, (name, cell) in enumerate(zip(header, row, strict=False)) if place not in unnamed},
            )


def _read_tsv(path: Path) -> Iterator[tuple[str, Any]]:
    """As `_read_csv`; quotation marks are read as text where they are no quotes around fields, since many programs write TSV without any.

    That is so where each line has all columns, but some field in quotes would end on a later line or not where its quotes do. Raises `CoraError` where
    the rows have all columns in both readings.
    """
    text = text_of(path)
    columns = {line.count("\t") for line in re.split(r"\r\n|\n|\r", text) if line.strip()}
    if len(columns) != 1 or columns == {0}:
        return _read_csv(path, "\t")
    rows = _quoted(text)
    if over := next((line for number, (line, _) in enumerate(rows, start=1) if line != number), None):
        if {len(row) - 1 for _, row in rows if row} == columns:
            raise CoraError(
                f"{path}, line {over}: its quotation marks may be text, or stand around a field that goes on from an earlier line; save the file as CSV or "
                "JSON Lines"
            )
    elif rows:
        return _read_csv(path, "\t")
    note(f"{path}: its quotation marks are not in pairs around fields, so they are read as text")
    return _read_csv(path, "\t", csv.QUOTE_NONE)


def _quoted(text: str) -> list[tuple[int, list[str]]]:
    """The rows of a TSV file with fields in quotes read, each with the line on which it ends; none where the quotes are none around fields."""
    reader = _rows(text, "\t", csv.QUOTE_MINIMAL)
    try:
        return [(reader.line_num, row) for row in reader]
    except csv.Error:
        return []


def _rows(text: str, delimiter: str, quoting: Literal[0, 3]) -> Any:
    """A reader of the package csv, which counts lines, too."""
    csv.field_size_limit(2**31 - 1)
    return csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter, quoting=quoting)


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".json": lambda path: _read_json(path, None, "train"),
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": read_parquet,
}
"""How a file is read, by the ending of its name."""
