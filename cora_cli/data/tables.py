"""Read the rows of Parquet files, folders of save_to_disk and hub data sets, as Arrow holds them."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cora_cli.environment import behind_hub_error, proxy_to_hub
from cora_cli.errors import CoraError
from cora_cli.progress import say
from cora_cli.reading import Malformed, parse_json, read_text

HELD_OUT = "test"
"""The split that a data set of held-out records is, where it has several."""


def one_of(splits: Iterable[str], split: str | None, usual: str | None, dataset: str) -> str:
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


def read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the records of a Parquet file, each with its place. Raises `CoraError` for a damaged file and for a column name that is there twice."""
    import pyarrow
    import pyarrow.parquet

    try:
        check_header(pyarrow.parquet.read_schema(path).names, str(path))
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


def read_folder(path: Path, split: str | None, usual: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a folder that `save_to_disk` of the package datasets wrote, for one data set or a dictionary of splits."""
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # the package raises a dozen unrelated types
        raise CoraError(f"{path} cannot be read as a folder of datasets.save_to_disk: {_first_line(error)}") from error
    if isinstance(found, datasets.DatasetDict):
        found = found[one_of(map(str, found), split, usual, str(path))]
    elif split is not None:
        raise CoraError(f"--split {split} applies to data sets with several splits, which {path} is not; leave it out")
    yield from _of_package(found, str(path))


def read_hub(dataset: str, subset: str | None, split: str) -> Iterator[tuple[str, Any]]:
    """Yield the records of a split of a hub data set, each with its place. Raises `CoraError` where it cannot be loaded."""
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


def check_header(columns: Sequence[str], where: str) -> None:
    """Raise `CoraError` for two columns of one name."""
    repeated = next((name for name, count in Counter(columns).items() if count > 1), None)
    if repeated is not None:
        raise CoraError(f"{where}: two columns are named {repeated!r}; rename or remove one of them")


def _of_package(rows: Any, dataset: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a data set of the package datasets as Arrow holds them.

    A format that was saved with it may hide columns and give arrays for lists, and sounds and images need other packages to be decoded.
    """
    number = 0
    for table in rows.with_format("arrow").iter(1000):
        for row in _rows(table):
            number += 1
            yield f"{dataset}, record {number}", row


class _Unheld:
    """In place of a value that Python cannot hold, as a date after the year 9999 or a map with a key twice: no text and no JSON, so that it is
    refused where a record needs it, and only there."""

    def __init__(self, kind: Any, error: Exception) -> None:
        self._said = f"unreadable ({_first_line(error)}): {kind}"

    def __str__(self) -> str:
        return self._said


def _rows(table: Any) -> list[dict[str, Any]]:
    """The rows of an Arrow table, without the nulls inside their nested values, and with JSON read (datasets.Json), which it stores as text.

    Arrow gives every object of a column the keys of all the others, with null for those it does not have.
    """
    import pyarrow

    def plain(value: Any, kind: pyarrow.DataType) -> Any:
        if isinstance(value, dict) and isinstance(kind, pyarrow.StructType):
            return {field.name: plain(value[field.name], field.type) for field in kind if value[field.name] is not None}
        if isinstance(value, dict) and isinstance(kind, pyarrow.MapType):
            return {key: plain(one, kind.item_type) for key, one in value.items() if one is not None}
        if isinstance(value, list) and hasattr(kind, "value_type"):
            return [plain(one, kind.value_type) for one in value]
        if isinstance(value, str) and isinstance(kind, pyarrow.JsonType):
            try:
                return parse_json(value)
            except Malformed as error:
                return _Unheld(kind, error)
        return value

    columns = [[plain(value, column.type) for value in _values(column)] for column in table.columns]
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


def _values(column: Any) -> list[Any]:
    try:
        return column.to_pylist(maps_as_pydicts="strict")
    except Exception:  # OverflowError, KeyError, UnicodeDecodeError and others
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py(maps_as_pydicts="strict")
    except Exception as error:
        return _Unheld(scalar.type, error)
