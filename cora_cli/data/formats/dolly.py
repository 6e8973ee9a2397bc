"""Dolly: an instruction, an optional context, and a response."""

from cora_cli.data.formats.shape import Raw, Shape, renamed
from cora_cli.errors import CoraError


def _read(record: Raw, where: str) -> Raw:
    if "context" in record and "input" in record:
        raise CoraError(f"{where}: both context and input could be the input of the instruction; choose one with --columns")
    return renamed(record, {"context": "input", "response": "output"})


DOLLY = Shape("Dolly", "alpaca", ("instruction", "response"), _read, reads=frozenset({"context", "input"}))
