"""Pairs of a prompt and its completion, which some data sets call its response."""

from cora_cli.data.formats.shape import Raw, Shape, renamed


def _read(record: Raw, where: str) -> Raw:
    return renamed(record, {"response": "completion"})


COMPLETION = Shape("prompt/completion", "prompt", ("prompt", "completion"))
RESPONSE = Shape("prompt/response", "prompt", ("prompt", "response"), _read)
