"""Recognise the shape of records by their columns, and check each record. Each shape has a module; `columns` takes the user's choice.

`readers` reads them from a file; `records` says what they become.
"""

import datetime
import decimal
import json
import uuid
from collections.abc import Mapping
from typing import Any

from cora_cli.data.formats.alpaca import ALPACA
from cora_cli.data.formats.columns import HOW_TO_CHOOSE
from cora_cli.data.formats.conversation import ROLES
from cora_cli.data.formats.dolly import DOLLY
from cora_cli.data.formats.messages import MESSAGES
from cora_cli.data.formats.preference import advice_for_preferences, choice_of, lacks_answer
from cora_cli.data.formats.prompt import COMPLETION, RESPONSE, holds_messages, is_printed_talk
from cora_cli.data.formats.published_code import HUMANEVAL, MBPP, MBPP_SANITIZED
from cora_cli.data.formats.question_answer import QUESTION_ANSWER
from cora_cli.data.formats.shape import Raw, Shape, is_nan
from cora_cli.data.formats.sharegpt import SHAREGPT
from cora_cli.data.formats.text import TEXT
from cora_cli.data.records import SCHEMAS, TEMPLATE_COLUMNS, Record, answer_weight
from cora_cli.errors import CoraError
from cora_cli.reading import Malformed, parse_json

TEMPLATE_ARGUMENTS = frozenset(
    {
        *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        *("tokenizer_kwargs", "sanitize_control_tokens"),
    }
)
"""What `cora` itself, or transformers, passes to a chat template, so that no variable of a record may have such a name."""


PUBLISHED = (HUMANEVAL, MBPP, MBPP_SANITIZED)
"""Shapes whose columns are so particular that other columns next to them decide nothing."""
SHAPES = (
    ALPACA,
    DOLLY,
    COMPLETION,
    RESPONSE,
    QUESTION_ANSWER,
    MESSAGES,
    SHAREGPT,
)
KNOWN = "instruction and output (Alpaca), instruction and response (Dolly), prompt and completion, question and answer, messages, conversations (ShareGPT), or text alone"


_ROLES = frozenset({*ROLES.values(), "model", "observation", "function_response"})
"""Roles that a chat template may know."""


def shape_of(columns: set[str], where: str) -> Shape:
    """Recognise a shape by its columns. Raises a `CoraError` that names the columns found and those needed, or what is ambiguous."""
    found = f"the columns {_listed(columns)}" if columns else "no columns"
    if published := [shape for shape in PUBLISHED if shape.fits(columns)]:
        return published[0]
    candidates = [shape for shape in SHAPES if columns >= set(shape.needs)]
    if len(candidates) > 1:
        names = " or ".join(shape.name for shape in candidates)
        raise CoraError(f"{where}: found {found}, which could be {names}; {HOW_TO_CHOOSE}")
    if not candidates and columns >= set(TEXT.needs):
        candidates = [TEXT]
    if not candidates:
        raise CoraError(f"{where}: found {found}; a record needs {KNOWN}; {HOW_TO_CHOOSE}")
    if extra := sorted(columns & candidates[0].excluded):
        raise CoraError(f"{where}: found {found}; records of {candidates[0].name} have no {', '.join(extra)}; {HOW_TO_CHOOSE}")
    return candidates[0]


def shape_for(first: Any, where: str) -> Shape:
    """Recognise the shape of records by the columns of the first one. Raises `CoraError`, also for preferences, with what would work."""
    columns = columns_of(where, first)
    is_known = any(columns >= set(shape.needs) for shape in (*PUBLISHED, *SHAPES, TEXT)) and not lacks_answer(first)
    if not is_known and (advice := advice_for_preferences(first)):
        raise CoraError(f"{where}: found the columns {_listed(columns)}, which are {advice}")
    return shape_of(columns, where)


def with_messages(shape: Shape, first: Any) -> Shape:
    """The shape, or that of its records with lists of messages if the first record holds one."""
    pair = shape.of_messages
    return pair if pair is not None and isinstance(first, dict) and holds_messages(first, *pair.needs) else shape


def own_shape(columns: set[str], where: str) -> Shape:
    """The shape of records that `cora` wrote itself: that of the first schema whose columns they have."""
    for schema, needed in SCHEMAS.items():
        if columns >= set(needed):
            return Shape(schema, schema, needed, is_chosen=True)
    raise CoraError(f"{where}: found the columns {_listed(columns) or '(none)'}, which are those of no record of cora")


def read_record(raw: Any, shape: Shape, where: str) -> Record:
    """One raw record of a shape, checked. Raises `CoraError` that names its place and what is wrong."""
    columns = columns_of(where, raw)
    if missing := [name for name in shape.needs if name not in columns]:
        found = _listed(columns) or "no columns"
        raise CoraError(f"{where}: column {', '.join(missing)} is missing; found {found}")
    if extra := sorted(columns & shape.excluded):
        raise CoraError(f"{where}: records of {shape.name} have no {', '.join(extra)}; {HOW_TO_CHOOSE}")
    if shape not in PUBLISHED and (parts := shape.unread_parts(raw)):
        remedy = (
            f"leave such records out, or train without it: --columns {choice_of(shape, raw)}"
            if shape.schema == "messages"
            else f"write the records as messages, or {HOW_TO_CHOOSE}"
        )
        raise CoraError(
            f"{where}: records of {shape.name} have no {', '.join(parts)}, which would be missing in the prompt; {remedy}"
        )
    return _checked(shape.read(raw, where), shape, raw, where)


def _listed(columns: set[str]) -> str:
    """The names in order; in quotes where they begin or end with what nobody sees."""
    return ", ".join(name if name.isprintable() and name == name.strip() else repr(name) for name in sorted(columns))


def columns_of(where: str, record: Any) -> set[str]:
    """The columns of one raw record. Raises `CoraError` for a value that has none."""
    if not isinstance(record, dict):
        raise CoraError(f"{where}: expected a record with named columns, found {json.dumps(record)[:60]}")
    return set(record)


def _checked(record: Raw, shape: Shape, raw: Raw, where: str) -> Record:
    schema = shape.schema
    checked = Record({name: value for name, value in record.items() if name in SCHEMAS[schema] or _is_json(value)}, where)
    if schema == "messages":
        messages = _as_json(record["messages"])
        _check_messages(messages, where)
        checked["messages"] = [_weighed(message, where) for message in messages]
        if answer_weight(checked["messages"][-1]) == 0:
            raise CoraError(
                f"{where}: the last answer is marked as not trained (the weight 0, or a mark such as `train: false`), so nothing of this record would be "
                "trained or compared; leave it out, or end it with an answer that counts"
            )
        for name in TEMPLATE_COLUMNS:
            if name in record:
                checked[name] = _template_value(name, record[name], where)
        return checked
    texts = SCHEMAS[schema]
    if schema == "alpaca":
        given = record.get("input")
        checked["input"] = "" if given is None or is_nan(given) else given
        texts = (*texts, "input")
    for name in texts:
        value = checked[name]
        if not isinstance(value, str) or not _is_json(value):
            column = next((own for own in (*shape.needs, *shape.reads) if raw.get(own) is value), name)
            shown = json.dumps(value, default=str)[:60]
            remedies: dict[type, str] = {
                **dict.fromkeys((int, float, bool), f', as in "{shown}"'),
                type(None): "; leave out records without it",
                **({float: "; leave out records without it"} if is_nan(value) else {}),
                bytes: "; convert the column from bytes to text",
            }
            raise CoraError(f"{where}: {column} must be text, not {shown}{remedies.get(type(value), '')}")
    asked, answer = checked[texts[0]], checked[SCHEMAS[schema][-1]]
    is_own = shape.is_chosen and shape.name == schema  # of an earlier version, which read such text
    if schema != "text" and not is_own and is_printed_talk(answer, asked):
        column = next((own for own in shape.needs if raw.get(own) is answer), texts[-1])
        raise CoraError(
            f"{where}: {column} is the text of a list of messages: {answer.strip()[:60]!r}; write the text of the answer there, or complete "
            "conversations as messages"
        )
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
    found = _as_json(found)
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


def _as_json(value: Any) -> Any:
    """A value of Parquet or pandas as JSON holds it: times, decimals and UUIDs within as the text that a template writes of them, NaN entries left out."""
    if isinstance(value, dict):
        return {name: _as_json(inner) for name, inner in value.items() if not is_nan(inner)}
    if isinstance(value, list):
        return [_as_json(inner) for inner in value]
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal | uuid.UUID):
        return str(value)
    return value


def _weighed(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A message without a weight that says what holds anyway: 1 or none for an answer, 0 or none for others."""
    if "weight" not in message:
        return message
    weight, usual = message["weight"], 1 if message["role"] == "assistant" else 0
    if weight is not None and weight not in (0, 1):
        raise CoraError(
            f"{where}: a message has the weight {json.dumps(weight, default=str)[:60]}; known are 0 and 1, whether it is trained"
        )
    return {name: value for name, value in message.items() if name != "weight"} if weight in (None, usual) else message


def _check_messages(messages: Any, where: str) -> None:
    if fault := _fault_of_messages(messages):
        raise CoraError(f"{where}: messages must be a list of {{role, content}} that ends with the assistant's answer, {fault}")
    for message in messages:
        role = message["role"]
        if role not in _ROLES and (meant := ROLES.get(role.strip().lower())) is not None:
            raise CoraError(f"{where}: messages have the role {role!r}, which chat templates do not know; write {meant!r}")


def _fault_of_messages(messages: Any) -> str | None:
    """How a sentence ends that says what messages must be; None if they are that."""
    if not isinstance(messages, list) or len(messages) < 2:
        return f"not {json.dumps(messages, default=str)[:120]}"
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f"and message {number} of {len(messages)} has no role: {json.dumps(message, default=str)[:120]}"
        if not _has_content(message):
            content = json.dumps(message.get("content"), default=str)[:60]
            others = ", ".join(sorted(message.keys() - {"role", "content"}))
            return (
                f"and message {number} of {len(messages)}, of the role {message['role']}, has the content {content}"
                f"{f' next to {others}' if others else ''}; text is needed, or tool_calls"
            )
    if messages[-1]["role"] != "assistant":
        return f"and the last of {len(messages)} is of the role {messages[-1]['role']}"
    for number, message in enumerate(messages, start=1):
        if name := next((name for name, value in message.items() if not _is_json({name: value})), None):
            shown = json.dumps(message[name], default=str)[:60]
            return f"and {name} of message {number} is nothing that JSON can hold: {shown}; leave it out"
    return None


def _has_content(message: Mapping[str, Any]) -> bool:
    """Whether a message says something: text, or the calls of an assistant whose text may then be missing."""
    content = message.get("content")
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))
