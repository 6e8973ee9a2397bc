"""ShareGPT: conversations of entries with `from` and `value`; `role` and `content` are read too."""

from cora_cli.data.formats.conversation import read_conversation
from cora_cli.data.formats.shape import Raw, Shape
from cora_cli.data.records import TEMPLATE_COLUMNS


def _read(record: Raw, where: str) -> Raw:
    return read_conversation(record, where, "conversations")


SHAREGPT = Shape("ShareGPT", "messages", ("conversations",), _read, reads=frozenset({"system", *TEMPLATE_COLUMNS}))
