"""Writes documents as Markdown, and as plain text for a terminal."""

from collections.abc import Iterable, Sequence

from cora_cli.render.canvas import Figure
from cora_cli.render.document import Block, Heading, Items, Text
from cora_cli.render.markdown_table import markdown_table
from cora_cli.render.table import Table, table_text, wrapped


def markdown(blocks: Iterable[Block]) -> str:
    """The document as Markdown; figures are linked as `plots/NAME.svg`."""
    return "\n\n".join(_markdown_block(block) for block in blocks) + "\n"


def terminal(blocks: Sequence[Block], width: int | None = None) -> str:
    """The document as aligned text, of lines of at most `width` characters where one is given.

    A star marks what is bold elsewhere, and figures are left out.
    """
    shown = [block for block in blocks if not isinstance(block, Figure) and block != Heading(2, "Figures")]
    return "\n\n".join(_terminal_block(block, width) for block in shown) + "\n"


def _markdown_block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_escape(block.text)}"
    if isinstance(block, Text):
        return f"**{_escape(block.text)}**" if block.kind == "verdict" else _escape(block.text)
    if isinstance(block, Items):
        return "\n".join(f"- {_escape(item)}" for item in block.items)
    if isinstance(block, Figure):
        return f"![{_escape(block.title)}](plots/{block.name}.svg)\n\n{_escape(block.caption)}"
    rows = [[f"**{text}**" if cell.bold else text for cell in row for text in [_escape(cell.plain())]] for row in block.rows]
    table = markdown_table([_escape(header) for header in block.headers], rows)
    return "\n\n".join([f"### {_escape(block.title)}", table, *map(_escape, block.notes)])


def _terminal_block(block: Block, width: int | None) -> str:
    if isinstance(block, Heading):
        text = wrapped(block.text, width)
        return f"{text}\n{('=' if block.level == 1 else '-') * max(map(len, text.splitlines()))}"
    if isinstance(block, Items):
        return "\n".join(wrapped(item, width, "- ", "  ") for item in block.items)
    if isinstance(block, Table):
        notes = [wrapped(note.replace("Bold:", "Star:").replace("in bold", "starred"), width) for note in block.notes]
        return "\n".join([wrapped(block.title, width), "", table_text(block.headers, block.rows, width), *notes])
    assert isinstance(block, Text)
    return wrapped(block.text, width)


def _escape(text: str) -> str:
    """Escape text so that a name cannot act as Markdown, as HTML, or as the end of a table cell."""
    for sign in "\\`*_[]<>|#":
        text = text.replace(sign, f"\\{sign}")
    return text
