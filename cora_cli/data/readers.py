"""Read the raw records of a JSON, JSONL, CSV, TSV or Parquet file, a folder of `save_to_disk` or a hub data set, each with its place for messages.

`formats` recognises the schema of the records and checks them.
"""

import bz2
import codecs
import csv
import io
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cora_cli.environment import behind_hub_error, proxy_to_hub
from cora_cli.errors import CoraError
from cora_cli.progress import say
from cora_cli.reading import Malformed, decode_json, decoded, parse_json, read_bytes, read_text, refuse_pointer
from cora_cli.writing import refuse_broken_link

_AROUND_NAMES = '\ufeff" '
"""What stands around a name in a header that is no longer the first row: the mark of a file's encoding, and quotes behind it."""
HELD_OUT = "test"
"""The split that a data set of held-out records is, where it has several."""
_TO_UTF8 = "; save it as UTF-8, or convert it: `iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW` does so for one of a Western European Windows"

_OTHER_KINDS = {
    b"\x1f\x8b": "a file of gzip: add .gz to its name",
    b"\x28\xb5\x2f\xfd": "a file of zstd: add .zst to its name",
    b"BZh": "a file of bzip2: add .bz2 to its name",
    b"\xfd7zXZ": "a file of xz: add .xz to its name",
    b"PAR1": "Parquet: give it the ending .parquet",
    b"PK\x03\x04": "a workbook of Excel or another zip archive: save the table as CSV, or unpack the archive",
}
"""What a file is that begins so and is no text, with what helps."""


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
                f"{', '.join(_COMPRESSIONS)}"
            )
        refuse_pointer(path)
        if ending == ".json":
            return _read_json(path, split, usual)
        if split is not None:
            raise CoraError(f"--split {split} applies to data sets with several splits, which {dataset} is not; leave it out")
        return _READERS[ending](path)
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        return _read_folder(path, split, usual)
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
    return _read_hub(dataset, subset, split or usual)


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
    return inner if path.suffix.lower() in _COMPRESSIONS and inner != ".parquet" else path.suffix.lower()


def _text(path: Path) -> str:
    """The text of a data file with its line ends unchanged, since a quoted CSV field may contain any of them.

    It is UTF-8, or what the mark at its begin says: Windows PowerShell and spreadsheets write UTF-16.
    """
    content = read_bytes(path)
    if (expand := _COMPRESSIONS.get(path.suffix.lower())) is not None:
        try:
            content = expand(content)
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            raise CoraError(f"{path} cannot be decompressed: {error}") from error
    # The mark of UTF-32 begins as one of UTF-16 does.
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and not content.startswith(codecs.BOM_UTF32_LE):
        try:
            return content.decode("utf-16")
        except UnicodeDecodeError as error:
            raise CoraError(f"{path} begins as UTF-16 text, but is none: {error.reason}; save it as UTF-8") from error
    kind = next((kind for begin, kind in _OTHER_KINDS.items() if content.startswith(begin)), None)
    return decoded(content, path, f", but {kind}" if kind else _TO_UTF8).removeprefix("\ufeff")


def _expanded(begin: Callable[[], Any]) -> Callable[[bytes], bytes]:
    """Expand one compressed stream after the other, as `cat a.gz b.gz` writes them.

    The modules' own functions leave out what follows the first stream, or is cut off, without a word.
    """

    def expand(data: bytes) -> bytes:
        parts = []
        while data:
            stream = begin()
            parts.append(stream.decompress(data))
            if not stream.eof:
                raise EOFError("the file ends before the compressed data do")
            data = stream.unused_data.lstrip(b"\0")
        return b"".join(parts)

    return expand


def _expanded_zstd(data: bytes) -> bytes:
    import pyarrow

    with pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd") as stream:
        return bytes(stream.read())


_COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": _expanded(lambda: zlib.decompressobj(wbits=31)),
    ".bz2": _expanded(bz2.BZ2Decompressor),
    ".xz": _expanded(lzma.LZMADecompressor),
    ".zst": _expanded_zstd,
}
"""How a compressed file of text is expanded, by the last ending of its name."""


def _read_json(path: Path, split: str | None, usual: str) -> Iterator[tuple[str, Any]]:
    """Yield the elements of an array, each with the line on which it starts; see `_read_object` for an object with arrays."""
    text = _text(path)
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
        raise CoraError(
            f"{path}, line {error.line or 1}: not valid JSON ({error}); a file with one record per line has the ending .jsonl"
        ) from error
    arrays = {key: rows for key, rows in value.items() if isinstance(rows, list) and all(isinstance(row, dict) for row in rows)}
    is_record = any(value.keys() >= {name} for name in ("messages", "conversations"))
    if not arrays or is_record:
        is_table = all(isinstance(column, dict | list) for column in value.values()) and not is_record
        advice = "; pandas writes one with DataFrame.to_json(FILE, orient='records')" if value and is_table else ""
        raise CoraError(f"{path}, line 1: expected an array of records, found {text.lstrip()[:20]!r}{advice}")
    # Arrays need not be splits, so none is taken without being named; --test-dataset names the split test.
    key = _one_of(arrays, split, usual if usual == HELD_OUT else None, str(path))
    for number, row in enumerate(arrays[key], start=1):
        yield f"{path}, {key}, record {number}", row


def _one_of(splits: Iterable[str], split: str | None, usual: str | None, dataset: str) -> str:
    """The split to read: the one that was asked for, the only one, or the usual one. Raises `CoraError` that names those there are."""
    names = list(splits)
    if split in names or (split is None and usual in names):
        return str(split or usual)
    if split is None and len(names) == 1:
        return names[0]
    if usual == HELD_OUT:
        raise CoraError(
            f"{dataset} has several splits and none is called {HELD_OUT}, which --test-dataset takes: {', '.join(names)}; write the records to hold "
            "out to a file or a folder of their own"
        )
    asked = f"has no split {split}" if split else "has several splits"
    raise CoraError(f"{dataset} {asked}; choose one with --split: {', '.join(names)}")


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
                opens = "; a file whose records take several lines holds an array of them and has the ending .json"
                hint = opens if line.strip() in ("[", "{", "[{") else ""
                raise CoraError(f"{path}, line {number}: not valid JSON ({error}): {line.strip()[:60]!r}{hint}") from error


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[tuple[str, Any]]:
    """Yield rows as dictionaries by the header's names, with the line on which each starts; a quoted field may span lines.

    Columns without a name are left out: the first one, where pandas writes its index, and empty ones, such as those of a spreadsheet.
    So are rows of empty cells, which spreadsheets write around a table.
    """
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True, delimiter=delimiter)
    header: list[str] = []
    unnamed: set[int] = set()
    empty = 0
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            row = next(reader)
        except StopIteration:
            if unnamed:
                say(f"{path}: columns without a name are left out ({', '.join(str(place + 1) for place in sorted(unnamed))})")
            if empty:
                say(f"{path}: {empty:,} row{'s' if empty > 1 else ''} of empty cells left out")
            return
        except csv.Error as error:
            raise CoraError(f"{where}: not valid {'CSV' if delimiter == ',' else 'TSV'} ({error})") from error
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
            _check_header([name for place, name in enumerate(header) if place not in unnamed], where)
        else:
            if [cell.strip(_AROUND_NAMES) for cell in row] == [name.strip(_AROUND_NAMES) for name in header]:
                raise CoraError(f"{where}: the row repeats the header, as in files put one after the other; remove it")
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


def _read_tsv(path: Path) -> Iterator[tuple[str, Any]]:
    return _read_csv(path, "\t")


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        _check_header(pyarrow.parquet.read_schema(path).names, str(path))
        rows = _rows(pyarrow.parquet.read_table(path))
    except (
        pyarrow.ArrowException,
        OSError,
        LookupError,
        ValueError,
        TypeError,
    ) as error:  # such as a struct that names a field twice
        raise CoraError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _read_folder(path: Path, split: str | None, usual: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a folder that `save_to_disk` of the package datasets wrote, for one data set or a dictionary of splits."""
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # the package raises a dozen unrelated types
        raise CoraError(f"{path} cannot be read as a folder of datasets.save_to_disk: {_first_line(error)}") from error
    if isinstance(found, datasets.DatasetDict):
        found = found[_one_of(map(str, found), split, usual, str(path))]
    elif split is not None:
        raise CoraError(f"--split {split} applies to data sets with several splits, which {path} is not; leave it out")
    yield from _of_package(found, str(path))


def _read_hub(dataset: str, subset: str | None, split: str) -> Iterator[tuple[str, Any]]:
    import datasets
    from huggingface_hub.constants import HF_HUB_OFFLINE

    name, _, revision = dataset.partition("@")
    if not HF_HUB_OFFLINE:  # without a network the package tries for half a minute, and the name may be a mistyped file's
        say(f"{dataset} is no file or folder here: asking the hub for a data set of that name")
    try:
        builder = _of_revision(datasets.load_dataset_builder(name, subset, revision=revision or None), dataset)
        builder.download_and_prepare()
        rows = builder.as_dataset(split=split)
    except CoraError:
        raise
    except Exception as error:  # the hub client raises a dozen unrelated types
        proxy = behind_hub_error(error) or (
            "" if isinstance(error, datasets.exceptions.DatasetNotFoundError) else proxy_to_hub()
        )
        raise CoraError(
            f"dataset {dataset!r} is not a local file and could not be loaded from the hub: {_first_line(error)}{proxy}"
        ) from error
    yield from _of_package(rows, dataset)


def _of_revision(builder: Any, dataset: str) -> Any:
    """What loads the revision that was asked for. Raises `CoraError` where the hub is not reached and the cache does not hold it.

    The package datasets then takes whichever revision was cached last, without a word.
    """
    from datasets.packaged_modules.cache.cache import Cache

    if not isinstance(builder, Cache):
        return builder
    name, _, revision = dataset.partition("@")
    cached = Path(builder.cache_dir)
    wanted = _commit(name, revision) if revision else builder.hash
    if wanted != builder.hash:
        if wanted is None or not (cached.parent / wanted).is_dir():
            raise CoraError(
                f"dataset {dataset!r}: the hub could not be reached, and {cached.parent} does not hold this revision; connect, or leave out the "
                f"revision to read the one that was cached last, {builder.hash}"
            )
        builder = Cache(
            dataset_name=builder.dataset_name,
            repo_id=name,
            config_name=builder.config.name,
            version=cached.parent.name,
            hash=wanted,
        )
    say(f"{dataset}: the hub could not be reached; read from the cache, at revision {wanted}")
    return builder


def _commit(name: str, revision: str) -> str | None:
    """The commit of a data set that a revision stands for, by the hub's own cache; None where it does not know."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    place = Path(HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}", "refs", revision)
    return read_text(place).strip() if place.is_file() else None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _check_header(columns: Sequence[str], where: str) -> None:
    repeated = next((name for name, count in Counter(columns).items() if count > 1), None)
    if repeated is not None:
        raise CoraError(f"{where}: two columns are named {repeated!r}; rename or remove one of them")


def _of_package(rows: Any, dataset: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a data set of the package datasets as Arrow holds them.

    A format that was saved with it may hide columns and give arrays for lists, and sounds and images need other packages to be decoded.
    """
    number = 0
    for table in rows.with_format("arrow").iter(1000):
        try:
            plain = _rows(table)
        except (LookupError, ValueError) as error:
            raise CoraError(f"{dataset} cannot be read: {_first_line(error)}") from error
        for row in plain:
            number += 1
            yield f"{dataset}, record {number}", row


def _rows(table: Any) -> list[dict[str, Any]]:
    """The rows of an Arrow table, without the nulls inside their nested values, and with JSON read (datasets.Json), which it stores as text.

    Arrow gives every object of a column the keys of all the others, with null for those it does not have. Raises `ValueError` or `LookupError`
    for malformed JSON and for a key that is there twice.
    """
    import pyarrow

    def plain(value: Any, kind: pyarrow.DataType) -> Any:
        if isinstance(value, dict) and isinstance(kind, pyarrow.StructType):
            return {field.name: plain(value[field.name], field.type) for field in kind if value[field.name] is not None}
        if isinstance(value, dict) and isinstance(kind, pyarrow.MapType):
            return {key: plain(one, kind.item_type) for key, one in value.items() if one is not None}
        if isinstance(value, list) and hasattr(kind, "value_type"):
            return [plain(one, kind.value_type) for one in value]
        return parse_json(value) if isinstance(value, str) and isinstance(kind, pyarrow.JsonType) else value

    columns = [(field.name, field.type) for field in table.schema]
    return [{name: plain(row[name], kind) for name, kind in columns} for row in table.to_pylist(maps_as_pydicts="strict")]


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".json": lambda path: _read_json(path, None, "train"),
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
"""How a file is read, by the ending of its name."""
