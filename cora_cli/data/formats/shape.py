"""What every module of this folder describes: one shape in which data sets are published, and how a record of it is read."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from cora_cli.data.records import SCHEMAS, Schema

Raw = Mapping[str, Any]
OF_PROMPTS = frozenset(
    {
        *("system", "system_prompt", "system_message", "history", "instruction", "input", "inputs", "context", "contexts"),
        *("passage", "document", "documents", "article", "choices", "options", "suffix"),
        *("functions", "image", "images", "video", "videos", "audio", "audios"),
    }
)
"""Columns that would be a part of the prompt, in any shape that does not read them."""


def _as_it_is(record: Raw, where: str) -> Raw:
    return record


@dataclasses.dataclass(frozen=True)
class Shape:
    """Records with the columns `needs`, called `name` in messages; `read` turns one, found at a place, into one of `schema`.

    `reads` are optional columns. `incomplete_with` are columns that have no place in this shape although they belong to its prompt or answer:
    next to one of them it is not recognised, nor next to others that would be a part of the prompt and hold something. `is_chosen`: the user named
    the columns, so that others decide nothing. `of_messages` is the shape of records with the same columns that hold lists of messages.
    """

    name: str
    schema: Schema
    needs: tuple[str, ...]
    read: Callable[[Raw, str], Raw] = _as_it_is
    incomplete_with: frozenset[str] = frozenset()
    is_chosen: bool = False
    reads: frozenset[str] = frozenset()
    of_messages: "Shape | None" = None

    @property
    def excluded(self) -> frozenset[str]:
        """Columns that may not stand next to those of this shape: `incomplete_with`, and those whose place its new columns take."""
        return frozenset() if self.is_chosen else self.incomplete_with | (set(SCHEMAS[self.schema]) - set(self.needs))

    def unread_parts(self, record: Raw) -> list[str]:
        """The columns of a record that are not empty and would be a part of its prompt, but have no place in this shape."""
        if self.is_chosen or self.schema == "text":
            return []
        own = {*self.needs, *self.reads}
        given = {
            name
            for name, value in record.items()
            if value and not is_nan(value) and not (isinstance(value, str) and value.strip() in ("", "[]"))
        }
        return sorted(name for name in given - own if name.strip().lower() in OF_PROMPTS)

    def fits(self, columns: set[str]) -> bool:
        """Whether records with these columns have the shape."""
        return columns >= set(self.needs) and not columns & self.excluded


def is_nan(value: Any) -> bool:
    """Whether a value is what pandas has for none."""
    return isinstance(value, float) and math.isnan(value)


def renamed(record: Raw, names: Mapping[str, str]) -> Raw:
    """The record with other names for some of its columns."""
    return {names.get(name, name): value for name, value in record.items()}
