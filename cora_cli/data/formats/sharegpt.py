"""ShareGPT: conversations of entries with `from` and `value`; `role` and `content` are read too."""

import json
from typing import Any

from cora_cli.data.formats.shape import Raw, Shape
from cora_cli.data.records import TEMPLATE_COLUMNS
from cora_cli.errors import CoraError

ROLES = {
    **{
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "chatgpt": "assistant",
        "assistant": "assistant",
        "model": "assistant",
    },
    **{"system": "system", "tool": "tool", "observation": "tool", "function_response": "tool"},
}


def messages_of(talk: Any, where: str, column: str = "conversations") -> Any:
    """The entries of a conversation as messages; entries that have a role are left as they are, for the check of messages."""
    if not isinstance(talk, list):
        return talk
    return [_message(entry, where, column) if isinstance(entry, dict) and "from" in entry else entry for entry in talk]


def _message(entry: dict[str, Any], where: str, column: str) -> dict[str, Any]:
    role = ROLES.get(entry["from"]) if isinstance(entry["from"], str) else None
    if role is None:
        found = json.dumps(entry["from"], default=str)[:60]
        raise CoraError(f"{where}: {column} has an entry from {found}; known are {', '.join(ROLES)}")
    message = {"role": role, "content": entry.get("value")}
    rest = {name: value for name, value in entry.items() if name not in ("from", "value")}
    for theirs, ours in (("from", "role"), ("value", "content")):
        if theirs in entry and ours in entry and entry[ours] != message[ours]:
            raise CoraError(f"{where}: {column} has an entry with both {theirs} and {ours}, which differ; remove one of them")
    return {**message, **rest}


def _read(record: Raw, where: str) -> Raw:
    messages = messages_of(record["conversations"], where)
    rest = {name: value for name, value in record.items() if name != "conversations"}
    system = rest.get("system")
    if isinstance(system, str) and isinstance(messages, list):
        del rest["system"]
        has_own = bool(messages) and isinstance(messages[0], dict) and messages[0].get("role") == "system"
        if system and has_own:
            raise CoraError(
                f"{where}: the column system and the first entry of conversations both hold a system message; remove one"
            )
        messages = [{"role": "system", "content": system}, *messages] if system else messages
    return {"messages": messages, **rest}


SHAREGPT = Shape("ShareGPT", "messages", ("conversations",), _read, reads=frozenset({"system", *TEMPLATE_COLUMNS}))
