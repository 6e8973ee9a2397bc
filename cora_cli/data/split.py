"""Read a data set and split off its held-out part, so that no held-out prompt is trained on."""

import dataclasses
import random
from collections.abc import Sequence

from cora_cli import rundir
from cora_cli.data.formats import checked_record, columns_of, published, schema_of
from cora_cli.data.readers import read_located
from cora_cli.data.records import Record, Schema, prompt_hash, prompt_hashes
from cora_cli.errors import CoraError, UsageError

BUILTIN_PREFIX = "builtin:"


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


def load_records(dataset: str) -> tuple[list[Record], Schema]:
    """Read and check every record of `dataset` (for a built-in set: its held-out part after its training part).

    Raises `CoraError` naming the file and line of the first malformed record.
    """
    if dataset.startswith(BUILTIN_PREFIX):
        split = _builtin(dataset)
        return [*split.train, *split.test], "alpaca"
    located = [(where, published(record, where)) for where, record in read_located(dataset)]
    if not located:
        raise CoraError(f"{dataset} holds no records")
    schema = schema_of(columns_of(*located[0]), located[0][0])
    return [checked_record(record, schema, where) for where, record in located], schema


def load_test_records(dataset: str) -> tuple[list[Record], Schema]:
    """Read the records to evaluate on: a built-in set's held-out part, or every record of a file."""
    if dataset.startswith(BUILTIN_PREFIX):
        return _builtin(dataset).test, "alpaca"
    return load_records(dataset)


def load_split(
    dataset: str, test_size: float | None, seed: int, validation_size: int | None = None, every_answer: bool = False
) -> DataSplit:
    """Read `dataset` and hold out `test_size` records: a count if at least 1, a share if below 1, None for the set's own split.

    A data set without its own split holds out a tenth. `validation_size` of the remaining records are set aside for selecting
    settings. The held-out records depend only on `seed`, the validation records on `seed` and the held-out ones.
    With `every_answer`, training records are also dropped where an earlier turn of theirs is a held-out prompt.
    Raises `CoraError` if no records would remain to train on.
    """
    split = _split(dataset, test_size, seed, every_answer)
    return _split_validation(split, validation_size, seed, dataset, every_answer) if validation_size else split


def _apart(records: Sequence[Record], others: Sequence[Record], schema: Schema, every_answer: bool) -> list[Record]:
    """The records of which no prompt that is trained on is a prompt of `others`."""
    known = {prompt_hash(record, schema) for record in others}
    return [record for record in records if known.isdisjoint(prompt_hashes([record], schema, every_answer))]


def _split_validation(split: DataSplit, count: int, seed: int, dataset: str, every_answer: bool) -> DataSplit:
    if count >= len(split.train):
        raise CoraError(
            f"{dataset} has {len(split.train)} training records, so {count} for validation leave none to train on; use fewer"
        )
    chosen = sorted(random.Random(f"validation {seed}").sample(range(len(split.train)), count))
    validation = [split.train[index] for index in chosen]
    train = _apart(split.train, validation, split.schema, every_answer)
    if not train:
        raise CoraError(
            f"{dataset}: every training prompt also occurs in the validation records, which leaves none to train on"
        )
    overlapping = split.overlapping + len(split.train) - len(validation) - len(train)
    return dataclasses.replace(split, train=train, validation=validation, overlapping=overlapping)


def _split(dataset: str, test_size: float | None, seed: int, every_answer: bool) -> DataSplit:
    if test_size is not None and not (0 <= test_size < 1 or (test_size >= 1 and float(test_size).is_integer())):
        raise UsageError(f"--test-size must be a count, or a share between 0 and 1, not {test_size}")
    if dataset.startswith(BUILTIN_PREFIX) and test_size is None:
        return _builtin(dataset)
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
    rest = [records[index] for index in sorted(order[count:])]
    train = _apart(rest, test, schema, every_answer)
    if not train:
        raise CoraError(f"{dataset}: every training prompt also occurs in the held-out records, which leaves none to train on")
    return DataSplit(train, test, schema, overlapping=len(rest) - len(train))


def _builtin(dataset: str) -> DataSplit:
    from cora_cli.data.builtin import load_builtin

    split = load_builtin(dataset.removeprefix(BUILTIN_PREFIX))
    parts = (("training", split.train), ("held-out", split.test))
    train, test = (
        [Record(record, f"{dataset}, {part} record {number}") for number, record in enumerate(records, start=1)]
        for part, records in parts
    )
    return DataSplit(train, test, "alpaca")
