"""Recognise and check the records of a data set, and split off the held-out part.

A record is a dictionary in one of three schemas, recognised by its columns. `readers` reads it from a file, `templates` turns it
into text, `encode` into tokens.
"""

import dataclasses
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from cora_cli import rundir
from cora_cli.data.readers import read_located
from cora_cli.errors import CoraError, UsageError
from cora_cli.reading import Malformed, parse_json

Schema = Literal["alpaca", "prompt", "messages"]
BUILTIN_PREFIX = "builtin:"
SCHEMAS: dict[Schema, tuple[str, ...]] = {
    "alpaca": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
    "messages": ("messages",),
}
TEMPLATE_COLUMNS = ("tools", "documents", "chat_template_kwargs")
"""Columns next to `messages` that the chat template receives as variables of the same name (the last one: as its entries)."""
TEST_COLUMNS = (
    "task_id",
    "test",
    "entry_point",
    "test_list",
    "test_setup_code",
    "test_imports",
    "challenge_test_list",
    "assertions",
)
"""Columns with the tests of a record that asks for code; they are no part of its prompt."""

TEMPLATE_ARGUMENTS = frozenset(
    {
        *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        *("tokenizer_kwargs", "sanitize_control_tokens"),
    }
)
"""What `cora` itself, or transformers, passes to a chat template, so that no variable of a record may have such a name."""


class Record(dict[str, Any]):
    """One record by column name; `where` is its file and line, for messages."""

    def __init__(self, values: Mapping[str, Any], where: str = "a record") -> None:
        super().__init__(values)
        self.where = where


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
    found = f"the columns {', '.join(sorted(columns))}" if columns else "no columns"
    raise CoraError(
        f"{where}: found {found}; a record needs instruction, output (and input), or prompt, completion, or messages"
    )


def prompt_key(record: Mapping[str, Any], schema: Schema) -> str:
    """The prompt of a record as JSON, equal for equal prompts in whichever schema; its answer and other columns do not enter."""
    if schema == "messages":
        said = [_said(message) for message in record["messages"][:-1]]
        prompt: list[Any] = [*said, *([extra] if (extra := template_values(record)) else [])]
    elif schema == "prompt":
        prompt = [["user", record["prompt"]]]
    else:
        prompt = [["user", f"{record['instruction']}\n\n{record['input']}" if record["input"] else record["instruction"]]]
    return json.dumps(prompt, sort_keys=True, ensure_ascii=False)


def _said(message: Mapping[str, Any]) -> Any:
    """A message of a role and a text as a pair, one with more (calls of tools, a name) as it is."""
    return [message["role"], message["content"]] if message.keys() == {"role", "content"} else message


def prompt_hash(record: Mapping[str, Any], schema: Schema) -> str:
    """32 hex digits of the hash of `prompt_key`."""
    return rundir.sha256_text(prompt_key(record, schema))[:32]


def turns(record: Record, schema: Schema) -> Iterator[Record]:
    """The record as one record per answer: for each answer of a conversation, the conversation up to it."""
    if schema != "messages":
        yield record
        return
    for place, message in enumerate(record["messages"]):
        if message["role"] == "assistant" and place > 0:
            yield Record({**record, "messages": record["messages"][: place + 1]}, record.where)


def prompt_hashes(records: Iterable[Record], schema: Schema, every_answer: bool) -> Iterator[str]:
    """`prompt_hash` of each prompt that is trained on: with `every_answer`, those before earlier answers too."""
    for record in records:
        for turn in turns(record, schema) if every_answer else [record]:
            yield prompt_hash(turn, schema)


def load_records(dataset: str) -> tuple[list[Record], Schema]:
    """Read and check every record of `dataset` (for a built-in set: its held-out part after its training part).

    Raises `CoraError` naming the file and line of the first malformed record.
    """
    if dataset.startswith(BUILTIN_PREFIX):
        split = _builtin(dataset)
        return [*split.train, *split.test], "alpaca"
    located = [(where, _published(record, where)) for where, record in read_located(dataset)]
    if not located:
        raise CoraError(f"{dataset} holds no records")
    schema = schema_of(_columns(*located[0]), located[0][0])
    return [_checked(record, schema, where) for where, record in located], schema


def place_of(record: Mapping[str, Any]) -> str:
    """The file and line of a record, for messages."""
    return record.where if isinstance(record, Record) else "a record"


def earlier_answers(record: Mapping[str, Any]) -> bool:
    """Whether a record is a conversation with answers before the last one."""
    return any(message["role"] == "assistant" for message in (record.get("messages") or [])[1:-1])


def unused_columns(records: Iterable[Mapping[str, Any]], schema: Schema) -> list[str]:
    """The columns of `records` that no template reads, sorted."""
    used = {*SCHEMAS[schema], *(("input",) if schema == "alpaca" else TEMPLATE_COLUMNS if schema == "messages" else ())}
    return sorted({name for record in records for name in record} - used - set(TEST_COLUMNS))


def template_values(record: Mapping[str, Any]) -> dict[str, Any]:
    """The variables that a record gives to the chat template in addition to its messages."""
    found = {name: record[name] for name in TEMPLATE_COLUMNS if record.get(name)}
    return {**{name: value for name, value in found.items() if isinstance(value, list)}, **found.get(TEMPLATE_COLUMNS[2], {})}


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


def _published(record: Any, where: str) -> Any:
    """A record of HumanEval or MBPP under the names of the schemas; any other as it is.

    MBPP's prompt is its text and its tests, without which no model could know the function's name (Austin et al. 2021, 2108.07732).
    """
    columns = set(record) if isinstance(record, dict) else set()
    if columns >= {"prompt", "canonical_solution", "test"} and "completion" not in columns:
        return {"completion" if name == "canonical_solution" else name: value for name, value in record.items()}
    if not columns >= {"code", "test_list"} or not columns & {"text", "prompt"} or columns & {"instruction", "completion"}:
        return record
    text, tests = record.get("text") or record.get("prompt"), record["test_list"]
    if not isinstance(text, str) or not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise CoraError(
            f"{where}: a record of MBPP needs a text and test_list, a list of assertions, not {json.dumps(tests, default=str)[:60]}"
        )
    rest = {name: value for name, value in record.items() if name not in ("text", "prompt", "code")}
    prompt = f"{text} Your code should pass these tests:\n\n" + "\n".join(tests)
    return {"instruction": prompt, "input": "", "output": record["code"], **rest}


def _columns(where: str, record: Any) -> set[str]:
    if not isinstance(record, dict):
        raise CoraError(f"{where}: expected a record with named columns, found {json.dumps(record)[:60]}")
    return set(record)


def _checked(record: Any, schema: Schema, where: str) -> Record:
    columns = _columns(where, record)
    if missing := [name for name in SCHEMAS[schema] if name not in columns]:
        found = ", ".join(sorted(columns)) or "no columns"
        raise CoraError(f"{where}: column {', '.join(missing)} is missing; found {found}")
    checked = Record({name: value for name, value in record.items() if name in SCHEMAS[schema] or _is_json(value)}, where)
    if schema == "messages":
        _check_messages(record["messages"], where)
        for name in TEMPLATE_COLUMNS:
            if name in record:
                checked[name] = _template_value(name, record[name], where)
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


def _template_value(name: str, value: Any, where: str) -> Any:
    """A column for the chat template; many data sets store it as JSON text, because its schema varies from row to row."""
    found = value
    if isinstance(value, str) and value.strip():
        try:
            found = parse_json(value)
        except Malformed as error:
            raise CoraError(f"{where}: {name} must be JSON, or JSON text: {error}: {value[:60]!r}") from error
    wanted, words = (dict, "an object") if name == "chat_template_kwargs" else (list, "a list")
    if found is None or found == "":
        return None
    if not isinstance(found, wanted) or not _is_json(found):
        raise CoraError(f"{where}: {name} must be {words}, or JSON text of one, not {json.dumps(value, default=str)[:60]}")
    if isinstance(found, dict) and (taken := sorted(found.keys() & TEMPLATE_ARGUMENTS)):
        raise CoraError(f"{where}: {name} must not set {taken[0]!r}, which is no variable of the chat template; remove it")
    return found


def _is_json(value: Any) -> bool:
    """Whether JSON can store a value: a date, NaN or half of an escaped surrogate pair cannot be stored."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError):
        return False
    return True


def _check_messages(messages: Any, where: str) -> None:
    shape_ok = (
        isinstance(messages, list)
        and len(messages) >= 2
        and all(isinstance(one, dict) and isinstance(one.get("role"), str) and _has_content(one) for one in messages)
    )
    if not shape_ok or messages[-1]["role"] != "assistant" or not _is_json(messages):
        raise CoraError(
            f"{where}: messages must be a list of {{role, content}} that ends with the assistant's answer, not "
            f"{json.dumps(messages, default=str)[:120]}"
        )


def _has_content(message: Mapping[str, Any]) -> bool:
    """Whether a message says something: text, or the calls of an assistant whose text may then be missing."""
    content = message.get("content")
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))
