"""Pairs of a prompt and its completion, which some data sets call its response: both texts, or both lists of messages, as TRL has them."""

import json
import re
from typing import Any

from cora_cli.data.formats.conversation import messages_of, read_conversation
from cora_cli.data.formats.shape import Raw, Shape, renamed
from cora_cli.data.records import TEMPLATE_COLUMNS
from cora_cli.errors import CoraError

_TALK = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")
"""How a list of messages begins, as JSON or as Python prints it."""


def _read(record: Raw, where: str) -> Raw:
    return _wanted(record, where)


def _read_response(record: Raw, where: str) -> Raw:
    return renamed(_wanted(record, where, "response"), {"response": "completion"})


def _wanted(record: Raw, where: str, answer: str = "completion") -> Raw:
    """The record. Raises `CoraError` if its column `label` says that the completion is not wanted, as in TRL's unpaired preferences."""
    label = record.get("label")
    if label is False or (isinstance(label, str) and label.strip().lower() == "false"):
        raise CoraError(
            f"{where}: the label is false, by which data of preferences mark a {answer} that is not wanted; leave such records out, or train on "
            f"all of them with --columns prompt=prompt,response={answer}"
        )
    return record


def pair_of_messages(name: str, prompt: str, answer: str, is_chosen: bool = False) -> Shape:
    """The shape of records whose `prompt` is the conversation before an answer and whose `answer` is a list of one message.

    The answer alone is trained: answers in the prompt have the weight 0 where they state none.
    """

    def read(record: Raw, where: str) -> Raw:
        before, after = (_messages(record[column], where, column) for column in (prompt, answer))
        if not before or _role(before[-1]) == "assistant":
            found = "is empty" if not before else "ends with an answer"
            raise CoraError(f"{where}: {prompt} {found}; it must be a conversation that ends with what is answered")
        if [_role(message) for message in after] != ["assistant"]:
            raise CoraError(
                f"{where}: {answer} must be a list of one message of the role assistant, not {json.dumps(after, default=str)[:120]}"
            )
        before = [
            {**message, "weight": 0} if _role(message) == "assistant" and message.get("weight") is None else message
            for message in before
        ]
        chosen = {"messages": [*before, *after]}
        rest = {key: value for key, value in record.items() if key not in (prompt, answer)}
        return (
            {**chosen, **rest}
            if is_chosen
            else read_conversation(_wanted({**chosen, **rest}, where, answer), where, "messages")
        )

    return Shape(
        f"{name} of messages",
        "messages",
        (prompt, answer),
        read,
        is_chosen=is_chosen,
        reads=frozenset({"system", *TEMPLATE_COLUMNS}),
    )


def holds_messages(record: Raw, prompt: str, answer: str) -> bool:
    """Whether a prompt or an answer is a list, or the prompt is the text of a list of messages, which is no question by itself."""
    asked = record.get(prompt)
    return (
        isinstance(asked, list) or isinstance(record.get(answer), list) or (isinstance(asked, str) and bool(_TALK.match(asked)))
    )


def _messages(value: Any, where: str, column: str) -> list[Any]:
    messages = messages_of(value, where, column)
    if not isinstance(messages, list):
        raise CoraError(
            f"{where}: {column} must be a list of {{role, content}}, as the other column is or those of the first record are, not "
            f"{json.dumps(value, default=str)[:60]}"
        )
    return messages


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


COMPLETION = Shape(
    "prompt/completion",
    "prompt",
    ("prompt", "completion"),
    _read,
    of_messages=pair_of_messages("prompt/completion", "prompt", "completion"),
)
RESPONSE = Shape(
    "prompt/response",
    "prompt",
    ("prompt", "response"),
    _read_response,
    of_messages=pair_of_messages("prompt/response", "prompt", "response"),
)
