"""A table and its cells: a number with its interval and, where a paper printed one, the published number.

`text`, `html` and `latex` each write a cell in one format; `with_interval` is the one-line form of the commands' own output.
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Cell:
    """A table cell: `text`, or a number with its `interval` (`± 0.012` or `[0.381, 0.405]`).

    `published` is the number in a paper for the same quantity, shown in parentheses.
    """

    text: str = "–"
    interval: str = ""
    published: float | None = None
    bold: bool = False

    @property
    def is_number(self) -> bool:
        """Whether the text is a number with an interval."""
        return bool(self.interval)

    @property
    def printed(self) -> str:
        """The published number in parentheses, or an empty string."""
        return "" if self.published is None else f"({self.published:g})"

    def plain(self) -> str:
        """All parts on one line."""
        return " ".join(part for part in (self.text, self.interval, self.printed) if part)


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells under headers, with notes below; the first column names the row."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...]


def p_value_text(p_value: float) -> str:
    """A p-value with three decimals, as `=0.042` or `<0.001`."""
    return "<0.001" if p_value < 0.0005 else f"={p_value:.3f}"


def with_interval(value: float, interval: Sequence[float] | None, digits: int) -> str:
    """Value and interval as text: `0.123 [0.100, 0.150]`, or `0.123 (one record)`, which has no interval."""
    if interval is None:
        return f"{value:.{digits}f} (one record)"
    low, high = interval
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
