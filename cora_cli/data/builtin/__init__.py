"""Data sets that ship with the program as generators: `builtin:instruct`, `builtin:code` and five single tasks.

Each is made from a fixed seed and has the same bytes on every machine; nothing is read from disk or from a network.
"""

import copy
from functools import cache

from cora_cli.data.builtin.build import BuiltinSplit
from cora_cli.errors import CoraError

__all__ = ["BUILTIN", "BuiltinSplit", "load_builtin"]

GENERAL = ("instruct", "code")
GENERAL_SIZE = (2400, 240)  # training and held-out records
TASK_SIZE = (400, 60)

BUILTIN: dict[str, str] = {
    "instruct": "general instruction following over more than 30 kinds of task",
    "code": "Python functions and classes with assertions",
    "task-sentiment": "sentiment of customer reviews, with the evidence",
    "task-arithmetic": "word problems in arithmetic, worked in steps",
    "task-json": "fields of a sentence as a JSON object",
    "task-rewrite": "messages in another tone, sentences in another tense or voice",
    "task-sql": "questions about a table as SQL queries",
}


def load_builtin(name: str) -> BuiltinSplit:
    """The shipped set `name` (without `builtin:`), built on first use; the caller owns what is returned.

    No held-out prompt occurs in training; no text or answer of a `task-*` set is held out in `instruct` or `code`.
    Raises `CoraError` for an unknown name.
    """
    if name not in BUILTIN:
        raise CoraError(f"there is no data set builtin:{name}; there are {', '.join('builtin:' + known for known in BUILTIN)}")
    return copy.deepcopy(_make(name))


@cache
def _make(name: str) -> BuiltinSplit:
    from cora_cli.data.builtin.build import build
    from cora_cli.data.builtin.catalogue import FAMILIES

    if name in GENERAL:
        return build(name, FAMILIES[name], *GENERAL_SIZE)
    held_out = frozenset(
        text
        for general in GENERAL
        for record in _make(general).test
        for text in (record["input"] or record["instruction"], record["output"])
    )
    return build(name, FAMILIES[name], *TASK_SIZE, excluded=held_out)
