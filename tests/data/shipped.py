"""The shipped sets as several test files of `builtin` read them."""

import re
from functools import cache

from cora_cli.data.builtin import load_builtin


@cache
def split(name):
    return load_builtin(name)


def everything(name):
    return split(name).train + split(name).test


def prompts(records):
    return [(record["instruction"], record["input"]) for record in records]


def matches(pattern, name="instruct", column="instruction"):
    """Records whose column fully matches the pattern, with the match; fails if there are too few to check."""
    found = [(record, match) for record in everything(name) if (match := re.fullmatch(pattern, record[column], re.DOTALL))]
    assert len(found) >= 5, pattern
    return found
