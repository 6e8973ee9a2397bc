"""The entries of a conversation as messages, from the forms in which they are published.

An entry has `role` and `content` (OpenAI) or `from` and `value` (ShareGPT). The content may be a list of parts that are text, and the
conversation JSON text, as CSV files have it.
"""

import json
from collections.abc import Mapping
from typing import Any

from cora_cli.data.formats.shape import Raw
from cora_cli.errors import CoraError
from cora_cli.reading import Malformed, parse_json

ROLES = {
    **{
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "chatgpt": "assistant",
        "assistant": "assistant",
        "model": "assistant",
    },
    **{"system": "system", "tool": "tool", "observation": "tool", "function_response": "tool", "function_call": "assistant"},
}
_CALL = "function_call"
"""The speaker of LLaMA-Factory's calls of tools, whose text is JSON."""
_TEXT_PARTS = ("text", "input_text", "output_text")
"""The types of parts that are text: those of chat completions, and those of OpenAI's Responses."""

_SHARES = ("loss_weight", "loss_scale")
"""Entries of an answer with its share of the loss: LLaMA-Factory's, and ms-swift's."""
_TRAINED = ("train", "training", "loss", *_SHARES)
"""Entries of an answer that say whether it is trained: axolotl's, ms-swift's, and LLaMA-Factory's."""
_DETAILS = ("train_detail", "training_detail")
"""axolotl's marks of parts of an answer."""


def messages_of(talk: Any, where: str, column: str) -> Any:
    """The entries of a conversation as messages; what is no entry is left as it is, for the check of messages.

    Raises `CoraError` for a speaker who is not known, for parts that are no text, and for text that is not JSON.
    """
    if isinstance(talk, str) and talk.lstrip().startswith("["):
        try:
            talk = parse_json(talk)
        except Malformed as error:
            raise CoraError(
                f"{where}: {column} is text that is not valid JSON ({error}): {talk[:60]!r}; write the data as JSON Lines or Parquet, which keep lists as "
                "such"
            ) from error
    if not isinstance(talk, list):
        return talk
    messages = [_message(entry, where, column) if isinstance(entry, dict) and "from" in entry else entry for entry in talk]
    return [
        _plain(message, f"{where}: {column}, message {number},") if isinstance(message, dict) else message
        for number, message in enumerate(messages, start=1)
    ]


def _plain(message: dict[str, Any], place: str) -> dict[str, Any]:
    """A message with text in place of its parts, and with a weight in place of the marks of other programs that say whether it is trained."""
    if isinstance(message.get("content"), list):
        message = {**message, "content": _joined(message["content"], place)}
    for name in (*_SHARES, *_DETAILS):
        if (stated := message.get(name)) not in (None, []) and _mark(stated) is None:
            raise CoraError(
                f"{place} has {name} {json.dumps(stated, ensure_ascii=False, default=str)[:60]}; cora trains all of an answer or nothing of it: write "
                '"weight": 1 or 0 in its place'
            )
    marks = {name: mark for name in _TRAINED if (mark := _mark(message.get(name))) is not None}
    if not marks or message.get("role") != "assistant":
        return message
    said = {*marks.values(), *([weight] if (weight := message.get("weight")) is not None else [])}
    if len(said) > 1:
        names = ", ".join(sorted({*marks, *(["weight"] if weight is not None else [])}))
        raise CoraError(
            f"{place} has {names}, of which one says that it is trained and another that it is not; remove one of them"
        )
    rest = {name: value for name, value in message.items() if name not in marks}
    return {**rest, "weight": int(said.pop())}


def says_trained(message: Mapping[str, Any]) -> bool:
    """Whether a message that is no answer, and so is never trained, is marked as one that is."""
    marks = (message.get("weight"), *(message.get(name) for name in _TRAINED))
    return message["role"] != "assistant" and any(map(_mark, marks))


def _mark(value: Any) -> bool | None:
    """The truth value that a mark states, also as a number or a text, which tables have for those that some rows lack; None for anything else."""
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.strip().lower())
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def read_conversation(record: Raw, where: str, column: str) -> Raw:
    """A record whose conversation is in `column`; a column `system` becomes its first message."""
    messages = messages_of(record[column], where, column)
    rest = {name: value for name, value in record.items() if name != column}
    system = rest.get("system")
    if isinstance(system, list):
        system = _joined(system, f"{where}: system")
    if isinstance(system, str) and isinstance(messages, list):
        del rest["system"]
        has_own = bool(messages) and isinstance(messages[0], dict) and messages[0].get("role") == "system"
        if system and has_own:
            raise CoraError(
                f"{where}: the column system and the first entry of {column} both hold a system message; remove one"
            )
        messages = [{"role": "system", "content": system}, *messages] if system else messages
    elif system:
        raise CoraError(f"{where}: system must be text, not {json.dumps(system, default=str)[:60]}")
    return {"messages": messages, **rest}


def _message(entry: dict[str, Any], where: str, column: str) -> dict[str, Any]:
    role = ROLES.get(entry["from"].strip().lower()) if isinstance(entry["from"], str) else None
    if role is None:
        found = json.dumps(entry["from"], default=str)[:60]
        raise CoraError(f"{where}: {column} has an entry from {found}; known are {', '.join(ROLES)}")
    message: dict[str, Any] = {"role": role, "content": entry.get("value")}
    if entry["from"].strip().lower() == _CALL:
        message |= {"content": None, "tool_calls": _calls(message["content"], f"{where}: {column} has an entry from {_CALL}")}
    rest = {name: value for name, value in entry.items() if name not in ("from", "value")}
    for theirs, ours in (("from", "role"), ("value", "content")):
        if theirs in entry and ours in entry and entry[ours] != message[ours]:
            raise CoraError(f"{where}: {column} has an entry with both {theirs} and {ours}, which differ; remove one of them")
    return {**message, **rest}


def _calls(text: Any, place: str) -> list[dict[str, Any]]:
    """The calls of tools in a text that is the JSON of one or of a list of them, each with `name` and `arguments`."""
    try:
        found = parse_json(text) if isinstance(text, str) else text
    except Malformed as error:
        raise CoraError(f"{place} whose value is not valid JSON ({error}): {text[:60]!r}") from error
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise CoraError(f"{place} whose value is no call with a name and arguments: {json.dumps(text, default=str)[:60]}")
    return [{"type": "function", "function": call} for call in calls]


def _joined(parts: list[Any], place: str) -> str:
    """The text of the parts of a message, one after the other, as the chat templates that read parts write them."""
    if not parts:
        raise CoraError(f"{place} has the content [], which says nothing; give it a text")
    return "".join(_text_of(part, place) for part in parts)


def _text_of(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    found = (
        f"a part of the type {kind}"
        if isinstance(kind, str) and kind not in _TEXT_PARTS
        else json.dumps(part, default=str)[:60]
    )
    raise CoraError(
        f"{place} holds {found}; only parts of text, {{type: text, text: …}}, can be read, so leave such records out"
    )
