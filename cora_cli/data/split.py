"""Read a data set and split off its held-out part, so that no held-out prompt is trained on."""

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

from cora_cli import hashing
from cora_cli.data.formats import columns_of, own_shape, read_record, shape_for, with_messages
from cora_cli.data.formats.columns import chosen_shape
from cora_cli.data.formats.conversation import says_trained
from cora_cli.data.formats.preference import refuse_unwanted
from cora_cli.data.readers import read_located
from cora_cli.data.records import SCHEMAS, Record, Schema, holds_missing, holds_nulls, prompt_hash, prompt_hashes
from cora_cli.data.tables import HELD_OUT
from cora_cli.errors import CoraError, UsageError
from cora_cli.progress import note, say
from cora_cli.rundir import RunDirectory

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
        """SHA-256 of all records in their order and as they are divided."""
        return hashing.sha256_json([self.train, self.test, *([self.validation] if self.validation else [])])


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which records of a data set to read, and which of their columns, where the user says so.

    `columns` are pairs such as `prompt=question`, `subset` a configuration of a hub data set, `split` one of its splits.
    """

    columns: tuple[str, ...] | None = None
    subset: str | None = None
    split: str | None = None

    def refuse(self, dataset: str) -> None:
        """Raise `CoraError` if anything is chosen, of a built-in data set."""
        given = [f"--{name}" for name in ("columns", "subset", "split") if getattr(self, name)]
        if given:
            raise CoraError(f"{given[0]} does not apply to {dataset}, which comes with cora; leave it out")


ALL = Choice()


def load_records(dataset: str, choice: Choice = ALL, usual: str = "train") -> tuple[list[Record], Schema]:
    """Read and check every record of `dataset` (for a built-in set: its held-out part after its training part), and say how they were read.

    `usual` is the split to read of a data set that has it among others, where none is chosen. Raises `CoraError` naming the file and
    line of the first malformed record.
    """
    if dataset.startswith(BUILTIN_PREFIX):
        choice.refuse(dataset)
        split = _builtin(dataset)
        return [*split.train, *split.test], "alpaca"
    located = list(read_located(dataset, choice.subset, choice.split, usual))
    if not located:
        raise CoraError(f"{dataset} holds no records")
    where, first = located[0]
    own = _is_own(Path(dataset))
    if choice.columns:
        shape = with_messages(chosen_shape(choice.columns), first)
    elif own:
        shape = own_shape(columns_of(where, first), where)
    else:
        shape = with_messages(shape_for(first, where), first)
    refuse_unwanted(located, shape)
    records = [read_record(record, shape, where) for where, record in located]
    if not own:
        say(f"{dataset}: read as {shape.name}, {len(records):,} record{'s' if len(records) > 1 else ''}")
    if marked := sum(says_trained(message) for record in records for message in record.get("messages", ())):
        note(
            f"{dataset}: {marked:,} messages that are no answers are marked as trained, which has no effect: only answers are trained"
        )
    if not own and (filled := sum(map(holds_nulls, records))):
        note(
            f"{dataset}: {_have(filled)} nulls inside tools or calls of tools, which the chat template writes as they are; JSON written "
            "from a table, as by datasets.to_json, has them where other records have values: leave such ones out"
        )
    if not own and (missing := sum(map(holds_missing, records))):
        note(
            f"{dataset}: {_have(missing)} a text that is nothing but nan, None, null or the like, as programs write it for a value that is "
            "missing; it is taken as it stands, so leave it empty in the file if it means nothing"
        )
    # Values that no run can record, such as a date, are not kept either.
    kept = set().union(*records) - {*SCHEMAS[shape.schema], "input"}
    read = {*shape.needs, *shape.reads, *(() if shape.is_chosen else ("input",))}
    if not own and (left := sorted({name for _, raw in located for name in raw} - read - kept)):
        note(f"{dataset}: columns that are left out: {', '.join(left)}")
    return records, shape.schema


def _have(records: int) -> str:
    return f"{records:,} record{' has' if records == 1 else 's have'}"


def _is_own(path: Path) -> bool:
    """Whether a file holds the held-out records of a run, which are in a schema already."""
    run = RunDirectory(path.parent)
    return path == run.test_records and run.exists()


def load_test_records(dataset: str, choice: Choice = ALL) -> tuple[list[Record], Schema]:
    """Read the records to evaluate on: a built-in set's held-out part, or every record of a file."""
    if dataset.startswith(BUILTIN_PREFIX):
        choice.refuse(dataset)
        return _builtin(dataset).test, "alpaca"
    return load_records(dataset, choice)


def load_split(
    dataset: str,
    test_size: float | None,
    seed: int,
    validation_size: int | None = None,
    every_answer: bool = False,
    choice: Choice = ALL,
    test_dataset: str | None = None,
) -> DataSplit:
    """Read `dataset` and hold out `test_size` records: a count if at least 1, a share if below 1, None for the set's own split.

    A data set without its own split holds out a tenth; with `test_dataset`, the records of that one are held out. `validation_size` of the
    remaining records are set aside for selecting
    settings. The held-out records depend only on `seed`, the validation records on `seed` and the held-out ones.
    With `every_answer`, training records are also dropped where an earlier turn of theirs is a held-out prompt.
    Raises `CoraError` if no records would remain to train on.
    """
    if test_dataset is None:
        split = _split(dataset, test_size, seed, every_answer, choice)
    else:
        split = _with_test_set(dataset, test_dataset, test_size, every_answer, choice)
    return _split_validation(split, validation_size, seed, dataset, every_answer) if validation_size else split


def _with_test_set(dataset: str, other: str, test_size: float | None, every_answer: bool, choice: Choice) -> DataSplit:
    """All records of `dataset` for training, without those whose prompts are in `other`, whose records are held out."""
    if test_size is not None:
        raise UsageError(
            f"--test-size {test_size:g} has no effect with --test-dataset, whose records are held out; leave one out"
        )
    records, schema = load_records(dataset, choice)
    if other.startswith(BUILTIN_PREFIX):
        test, test_schema = load_test_records(other)
    else:
        test, test_schema = load_records(other, Choice(choice.columns, choice.subset), usual=HELD_OUT)
    if test_schema != schema:
        raise CoraError(
            f"the records of {dataset} are read as {schema} and those of {other} as {test_schema}; give both the same columns"
        )
    train = _apart(records, test, schema, every_answer)
    if not train:
        raise CoraError(f"{dataset}: every training prompt also occurs in {other}, which leaves none to train on")
    return DataSplit(train, test, schema, overlapping=len(records) - len(train))


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
            f"{dataset}: every training prompt also occurs in the validation records, which leaves none to train on; leave out --validation-size"
        )
    overlapping = split.overlapping + len(split.train) - len(validation) - len(train)
    return dataclasses.replace(split, train=train, validation=validation, overlapping=overlapping)


def _split(dataset: str, test_size: float | None, seed: int, every_answer: bool, choice: Choice) -> DataSplit:
    if test_size is not None and not (0 <= test_size < 1 or (test_size >= 1 and float(test_size).is_integer())):
        raise UsageError(f"--test-size must be a count, or a share between 0 and 1, not {test_size}")
    if dataset.startswith(BUILTIN_PREFIX) and test_size is None:
        choice.refuse(dataset)
        return _builtin(dataset)
    records, schema = load_records(dataset, choice)
    size = 0.1 if test_size is None else test_size
    count = int(size) if size >= 1 else round(size * len(records))
    if count >= len(records):
        raise CoraError(
            f"{dataset} holds {len(records)} records, so holding out {count} leaves none to train on; use a smaller --test-size"
        )
    if size and not count:
        nothing = f"{dataset} has too few records ({len(records)}) for a held-out share of {size:g}"
        if test_size is not None:
            raise CoraError(f"{nothing}: none would be held out; give --test-size a larger share or a count, or 0 for none")
        note(f"{nothing}: none is held out")
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    test = [records[index] for index in sorted(order[:count])]
    rest = [records[index] for index in sorted(order[count:])]
    train = _apart(rest, test, schema, every_answer)
    if not train:
        raise CoraError(
            f"{dataset}: every training prompt also occurs in the held-out records, which leaves none to train on; --test-size 0 holds none out, and "
            "--test-dataset holds out others"
        )
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
