"""Conversations in OpenAI's form: messages of a role and a content, with tools and calls of them."""

from cora_cli.data.formats.conversation import read_conversation
from cora_cli.data.formats.shape import Raw, Shape
from cora_cli.data.records import TEMPLATE_COLUMNS


def _read(record: Raw, where: str) -> Raw:
    return read_conversation(record, where, "messages")


MESSAGES = Shape("messages", "messages", ("messages",), _read, reads=frozenset({"system", *TEMPLATE_COLUMNS}))
