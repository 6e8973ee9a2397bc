"""The document model: headings, paragraphs, lists, tables and figures in reading order.

Reports and inspections build a list of blocks, and `text`, `html` and `latex` each write that list in one format.
"""

import dataclasses

from cora_cli.render.canvas import Figure
from cora_cli.render.table import Table


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


Block = Heading | Text | Items | Table | Figure
