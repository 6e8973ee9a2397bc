"""Conversations in OpenAI's form: messages of a role and a content, with tools and calls of them."""

from cora_cli.data.formats.shape import Shape
from cora_cli.data.records import TEMPLATE_COLUMNS

MESSAGES = Shape("messages", "messages", ("messages",), reads=frozenset(TEMPLATE_COLUMNS))
