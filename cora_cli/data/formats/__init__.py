"""Recognise the shape of records by their columns, and check each record.

`readers` reads them from a file; `records` says what they become.
"""

import json
from collections.abc import Mapping
from typing import Any

from cora_cli.data.records import SCHEMAS, TEMPLATE_COLUMNS, Record, Schema
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


def schema_of(columns: set[str], where: str) -> Schema:
    """Recognise a schema by its columns. Raises a `CoraError` that names the columns found and those needed."""
    for schema, needed in SCHEMAS.items():
        if columns >= set(needed):
            return schema
    found = f"the columns {', '.join(sorted(columns))}" if columns else "no columns"
    raise CoraError(
        f"{where}: found {found}; a record needs instruction, output (and input), or prompt, completion, or messages"
    )


def published(record: Any, where: str) -> Any:
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


def columns_of(where: str, record: Any) -> set[str]:
    """The columns of one raw record. Raises `CoraError` for a value that has none."""
    if not isinstance(record, dict):
        raise CoraError(f"{where}: expected a record with named columns, found {json.dumps(record)[:60]}")
    return set(record)


def checked_record(record: Any, schema: Schema, where: str) -> Record:
    """A raw record of a schema as a `Record`. Raises `CoraError` that names its place and what is wrong."""
    columns = columns_of(where, record)
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
