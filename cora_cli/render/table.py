"""A table and its cells: a number with its interval and, where a paper printed one, the published number.

`text`, `html` and `latex` each write a cell in one format; `with_interval` is the one-line form of the commands' own output.
"""

import dataclasses
import textwrap
from collections.abc import Sequence

from cora_cli.render.markdown_table import markdown_table


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
    """Value and interval as text: `0.123 [0.100, 0.150]`, or `0.123 –` where there is no interval."""
    return number(value, interval, digits).plain()


def number(value: float, interval: Sequence[float] | None, digits: int, more: str = "") -> Cell:
    """The same as a cell, in which `more` stands between the two."""
    text = f"{value:.{digits}f} {more}".rstrip()
    found = "–" if interval is None else "[{}, {}]".format(*(f"{end:.{digits}f}" for end in interval))
    return Cell(text, found)


def table_text(headers: Sequence[str], rows: Sequence[Sequence[Cell]], width: int | None = None) -> str:
    """The table as aligned text, of lines of at most `width` characters where one is given.

    A star marks a bold cell. What is too wide is transposed, or loses its intervals, which a line below says, or becomes a list of rows.
    """
    if width is None or not rows:
        return markdown_table(headers, [[_starred(cell) for cell in row] for row in rows])
    bare = [[dataclasses.replace(cell, interval="") for cell in row] for row in rows]
    lost = f"The intervals do not fit into {width} columns."
    for cells, note in ((rows, ""), (bare, lost)):
        texts = [[_starred(cell) for cell in row] for row in cells]
        lying = [headers, *texts]
        standing = [list(column) for column in zip(*lying, strict=True)]
        for first, *others in (lying, standing):
            text = markdown_table(first, others)
            if len(text.partition("\n")[0]) <= width:
                return f"{text}\n{wrapped(note, width)}" if note and bare != rows else text
    return "\n".join(_listed(headers, row, width) for row in rows)


def _listed(headers: Sequence[str], row: Sequence[Cell], width: int) -> str:
    """A row as the name of the row and a line for each of its cells."""
    entries = [f"{header}: {_starred(cell)}" for header, cell in zip(headers[1:], row[1:], strict=True)]
    return "\n".join([wrapped(_starred(row[0]), width), *(wrapped(entry, width, "  ", "    ") for entry in entries)])


def wrapped(text: str, width: int | None, first: str = "", others: str = "") -> str:
    """`text` in lines of at most `width` characters, which begin with `first` and `others`; longer words, such as paths, stay whole."""
    if width is None:
        return first + text
    return textwrap.fill(
        text,
        max(width, 20),
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _starred(cell: Cell) -> str:
    return cell.plain() + (" *" if cell.bold else "")
