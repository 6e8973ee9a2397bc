"""Pairs of a prompt and its completion, which some data sets call its response: both texts, or both lists of messages, as TRL has them."""

import json
import re
from collections.abc import Mapping
from typing import Any

from cora_cli.data.formats.conversation import messages_of, read_conversation
from cora_cli.data.formats.shape import Raw, Shape, renamed
from cora_cli.data.records import TEMPLATE_COLUMNS
from cora_cli.errors import CoraError
from cora_cli.reading import Malformed, parse_json

TALK = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")
"""How a list of messages begins, as JSON or as Python prints it."""


def _read_response(record: Raw, where: str) -> Raw:
    return renamed(record, {"response": "completion"})


def pair_of_messages(name: str, prompt: str, answer: str, is_chosen: bool = False) -> Shape:
    """The shape of records whose `prompt` is the conversation before an answer and whose `answer` is a list of one message, or that message.

    The answer alone is trained: answers in the prompt have the weight 0 where they state none. The prompt may also be an object with `messages` and,
    next to them, variables of the chat template, as OpenAI's preference data has it.
    """

    def read(record: Raw, where: str) -> Raw:
        asked = record[prompt]
        variables: dict[str, Any] = {}
        if isinstance(asked, Mapping) and "messages" in asked:
            variables = {name: asked[name] for name in TEMPLATE_COLUMNS if asked.get(name)}
            asked = asked["messages"]
        before, after = _messages(asked, where, prompt), _messages(_listed(record[answer]), where, answer)
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
        rest = {key: value for key, value in record.items() if key not in (prompt, answer)} | variables
        return {**chosen, **rest} if is_chosen else read_conversation({**chosen, **rest}, where, "messages")

    return Shape(
        f"{name} of messages",
        "messages",
        (prompt, answer),
        read,
        is_chosen=is_chosen,
        reads=frozenset({"system", *TEMPLATE_COLUMNS}),
    )


def holds_messages(record: Raw, prompt: str, answer: str) -> bool:
    """Whether a prompt or an answer is a list or holds messages, or the prompt is the text of a list of messages, which is no question by itself."""
    asked = record.get(prompt)
    return (
        holds_conversation(asked)
        or holds_conversation(record.get(answer))
        or (isinstance(asked, str) and bool(TALK.match(asked)))
    )


def is_printed_talk(answer: str, asked: str) -> bool:
    """Whether the text of an answer is a list of messages as a table holds it: as Python prints it, or as JSON of the answer's message or of the question
    with it. Other JSON may be what a model is to write."""
    if not TALK.match(answer):
        return False
    try:
        messages = parse_json(answer)
    except Malformed:
        return True
    speakers = [message.get("role", message.get("from")) for message in messages if isinstance(message, dict)]
    if len(speakers) != len(messages) or speakers[-1] not in ("assistant", "gpt"):
        return False
    return len(messages) == 1 or any(asked.strip() == str(one.get("content", one.get("value"))).strip() for one in messages)


def holds_conversation(value: Any) -> bool:
    """Whether a value is a list, though not one of texts, a message, or an object with messages."""
    is_list = isinstance(value, list) and not any(isinstance(one, str) for one in value)
    return is_list or (isinstance(value, Mapping) and bool(value.keys() & {"role", "from", "messages"}))


def _listed(value: Any) -> Any:
    """A single message as a list of it."""
    return [value] if isinstance(value, Mapping) and value.keys() & {"role", "from"} else value


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
    of_messages=pair_of_messages("prompt/completion", "prompt", "completion"),
)
RESPONSE = Shape(
    "prompt/response",
    "prompt",
    ("prompt", "response"),
    _read_response,
    of_messages=pair_of_messages("prompt/response", "prompt", "response"),
)
