"""What a record is once it is read: one of a few schemas, each with its columns, its prompt, and the hash of that prompt.

`formats` turns the shapes in which data are published into these, `templates` turns them into text.
"""

import json
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Literal

from cora_cli import hashing

Schema = Literal["alpaca", "prompt", "messages", "text"]
SCHEMAS: dict[Schema, tuple[str, ...]] = {
    "alpaca": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
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
MESSAGE_ENTRIES = frozenset(
    {
        *("role", "content", "name", "recipient", "channel", "prefix", "task"),
        *("tool_calls", "tool_name", "tool_plan", "tool_responses", "tool_results", "function_call", "tools", "functions"),
        *("reasoning", "reasoning_content", "thinking", "thoughts", "documents", "citations"),
    }
)
"""Entries of a message that chat templates write. Others, such as an id, a time or a mark, make no other prompt of the same conversation."""
_MISSING = frozenset({"nan", "NaN", "NaT", "<NA>", "None", "null", "NULL", "NA", "#N/A", "\\N"})
"""What pandas, Python, databases, R and spreadsheets write for a value that is missing."""
_Form = Literal["read", "complete", "written"]
"""How a prompt is hashed: with the entries that templates read; as earlier versions did, with all of them; and as the first ones, white space included."""


class Record(dict[str, Any]):
    """One record by column name; `where` is its file and line, for messages."""

    def __init__(self, values: Mapping[str, Any], where: str = "a record") -> None:
        super().__init__(values)
        self.where = where


def prompt_key(record: Mapping[str, Any], schema: Schema, form: _Form = "read") -> str:
    """The prompt of a record as JSON, equal for equal prompts in whichever schema; its answer and other columns do not enter.

    Prompts that differ only in white space are equal, and so are those whose messages differ only in entries that no template reads. A text
    without a prompt stands for itself.
    """
    text = (lambda value: value) if form == "written" else _collapsed
    if schema == "messages":
        said = [_said(_read(message) if form == "read" else message, text) for message in record["messages"][:-1]]
        prompt: list[Any] = [*said, *([extra] if (extra := template_values(record)) else [])]
    elif schema == "prompt":
        prompt = [["user", text(record["prompt"])]]
    elif schema == "text":
        prompt = [["text", text(record["text"])]]
    else:
        given = f"{record['instruction']}\n\n{record['input']}" if record["input"] else record["instruction"]
        prompt = [["user", text(given)]]
    return json.dumps(prompt, sort_keys=True, ensure_ascii=False)


def _collapsed(value: Any) -> Any:
    """A text with one space for each run of white space and none at its ends; another value as it is."""
    return " ".join(value.split()) if isinstance(value, str) else value


def _read(message: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a message that tell its prompt from others: without empty ones, and without the identifiers of calls of tools."""
    read = {
        name: value
        for name, value in message.items()
        if name in MESSAGE_ENTRIES and (value or (name == "content" and value is not None))
    }
    if isinstance(calls := read.get("tool_calls"), list):
        read["tool_calls"] = [
            {name: value for name, value in call.items() if name not in ("id", "index")} if isinstance(call, Mapping) else call
            for call in calls
        ]
    return read


def _said(message: Mapping[str, Any], text: Callable[[Any], Any]) -> Any:
    """A message of a role and a text as a pair, one with more (calls of tools, a name) with all its entries."""
    if message.keys() - {"weight"} == {"role", "content"}:
        return [message["role"], text(message["content"])]
    return {name: text(value) if name == "content" else value for name, value in message.items() if name != "weight"}


def prompt_hash(record: Mapping[str, Any], schema: Schema, form: _Form = "read") -> str:
    """32 hex digits of the hash of `prompt_key`."""
    return hashing.sha256_text(prompt_key(record, schema, form))[:32]


def is_among(record: Mapping[str, Any], schema: Schema, hashes: Collection[str]) -> bool:
    """Whether the prompt of a record is among recorded `hashes`, which earlier versions made of other forms of it."""
    return any(prompt_hash(record, schema, form) in hashes for form in typing.get_args(_Form))


def repeated_prompts(records: Iterable[Mapping[str, Any]], schema: Schema) -> int:
    """How many records have the prompt of an earlier one."""
    keys = [prompt_key(record, schema) for record in records]
    return len(keys) - len(set(keys))


def repeated_notice(repeated: int, records: int) -> str:
    """What records with equal prompts mean for the numbers about them."""
    return f"{repeated} of {records} have the prompt of an earlier one; intervals take all records as independent, and so are too narrow"


def turns(record: Record, schema: Schema) -> Iterator[Record]:
    """The record as one record per answer: for each answer of a conversation whose weight is not 0, the conversation up to it."""
    if schema != "messages":
        yield record
        return
    for place, message in enumerate(record["messages"]):
        if message["role"] == "assistant" and place > 0 and answer_weight(message) != 0:
            yield Record({**record, "messages": record["messages"][: place + 1]}, record.where)


def answer_weight(message: Mapping[str, Any]) -> int:
    """Whether an answer is trained, by the `weight` of OpenAI's fine-tuning data: 1 if it states none."""
    return int(message.get("weight", 1))


def prompt_hashes(records: Iterable[Record], schema: Schema, every_answer: bool) -> Iterator[str]:
    """`prompt_hash` of each prompt that is trained on: with `every_answer`, those before earlier answers too."""
    for record in records:
        for turn in turns(record, schema) if every_answer else [record]:
            yield prompt_hash(turn, schema)


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


def holds_missing(record: Mapping[str, Any]) -> bool:
    """Whether a text of the record is nothing but a word that programs write into a table for a value that is missing."""
    texts = [record.get(column) for column in ("instruction", "input", "output", "prompt", "completion", "text")]
    texts += [message.get("content") for message in record.get("messages") or []]
    return any(isinstance(text, str) and text.strip() in _MISSING for text in texts)


def holds_nulls(record: Mapping[str, Any]) -> bool:
    """Whether there are nulls inside the values that a chat template gets: in calls of tools, or in tools themselves."""

    def has_null(value: Any) -> bool:
        parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
        return any(part is None or has_null(part) for part in parts)

    given = [part for message in record.get("messages") or [] for part in message.values()]
    return any(map(has_null, [*given, *template_values(record).values()]))
