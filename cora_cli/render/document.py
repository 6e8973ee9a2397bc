"""The document model: headings, paragraphs, lists, tables and figures in reading order.

Reports and inspections build a list of blocks, and `text`, `html` and `latex` each write that list in one format.
"""

import dataclasses

from cora_cli.render.canvas import Figure


@dataclasses.dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the title."""

    level: int
    text: str


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph. `kind` is "verdict" for the main result, "note" for small print, or "text"."""

    text: str
    kind: str = "text"


@dataclasses.dataclass(frozen=True)
class Items:
    """A list of sentences."""

    items: tuple[str, ...]


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


Block = Heading | Text | Items | Table | Figure
