"""Conversations in OpenAI's form: messages of a role and a content, with tools and calls of them."""

from cora_cli.data.formats.shape import Shape

MESSAGES = Shape("messages", "messages", ("messages",))
