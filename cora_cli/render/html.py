"""Writes documents as one self-contained HTML page: no network, no scripts, embedded figures, usable on a phone and in dark mode.

All text is escaped; only the SVG of the figures, which this package drew, is inserted unchanged.
"""

from collections.abc import Iterable, Sequence
from html import escape

from cora_cli.render.canvas import INK, Figure
from cora_cli.render.document import Block, Heading, Items, Text
from cora_cli.render.table import Cell, Table

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --ground: #fff; --raised: #f6f8fa; --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9da7b1; --line: #3d444d; --ground: #0d1117; --raised: #151b23; --accent: #56b4e9; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 78rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 1rem 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
p, ul { margin: .5rem 0; max-width: 48rem; }
ul { padding-left: 1.2rem; }
li { margin: .3rem 0; }
.verdict { border-left: 4px solid var(--accent); background: var(--raised); padding: .7rem 1rem; font-weight: 600; }
.note, .notes, figcaption { color: var(--soft); font-size: .85rem; line-height: 1.45; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .4rem .65rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); vertical-align: top; }
thead th { border-top: 0; background: var(--raised); vertical-align: bottom; }
th:first-child, .words { text-align: left; }
tbody th { font-weight: 400; position: sticky; left: 0; background: var(--ground); max-width: 13rem; white-space: normal;
  overflow-wrap: break-word; }
thead th:first-child { position: sticky; left: 0; }
td small { display: block; color: var(--soft); font-size: .78rem; }
.table, figure { margin: 1.2rem 0 1.8rem; }
.table h3, figure h3 { font-size: 1rem; margin: 0 0 .5rem; }
figure .scroll { padding: .5rem; }
figure svg { display: block; width: 100%; min-width: 34rem; max-width: 52rem; height: auto; margin: 0 auto;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
"""


def page(documents: Sequence[Iterable[Block]], title: str, version: str) -> str:
    """One page with several documents, one after the other."""
    body = "\n".join(f"<section>\n{''.join(_block(block) for block in blocks)}</section>" for blocks in documents)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f'<footer class="note">Created by cora {escape(version)}.</footer>\n</body>\n</html>\n'
    )


def _block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{escape(block.text)}</h{block.level}>\n"
    if isinstance(block, Text):
        return f'<p class="{block.kind}">{escape(block.text)}</p>\n'
    if isinstance(block, Items):
        return "<ul>\n" + "".join(f"<li>{escape(item)}</li>\n" for item in block.items) + "</ul>\n"
    if isinstance(block, Figure):
        return _figure(block)
    return _table(block)


def _table(table: Table) -> str:
    words = [table.headers[1:2] == ("method",) and place == 1 for place in range(len(table.headers))]
    heads = "".join(
        f'<th scope="col"{_words(wordy)}>{escape(header)}</th>' for header, wordy in zip(table.headers, words, strict=True)
    )
    rows = []
    for first, *rest in table.rows:
        cells = "".join(f"<td{_words(wordy)}>{_cell(cell)}</td>" for cell, wordy in zip(rest, words[1:], strict=True))
        rows.append(f'<tr><th scope="row">{_cell(first)}</th>{cells}</tr>\n')
    notes = "".join(f'<p class="notes">{escape(note)}</p>\n' for note in table.notes)
    return (
        f'<div class="table">\n<h3>{escape(table.title)}</h3>\n<div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escape(table.title)}"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{"".join(rows)}</tbody>\n</table></div>\n'
        f"{notes}</div>\n"
    )


def _words(wordy: bool) -> str:
    return ' class="words"' if wordy else ""


def _cell(cell: Cell) -> str:
    value = f"<b>{escape(cell.text)}</b>" if cell.bold else escape(cell.text)
    below = "".join(
        f"<small>{escape(part)}</small>" for part in (cell.interval, cell.printed and f"paper {cell.printed}") if part
    )
    return value + below


def _figure(figure: Figure) -> str:
    # The ink takes the text colour of the page, so that axes stay readable in dark mode.
    svg = figure.svg.replace(INK, "currentColor").replace("<svg", f'<svg role="img" aria-label="{escape(figure.title)}"', 1)
    return (
        f'<figure>\n<h3>{escape(figure.title)}</h3>\n<div class="scroll" tabindex="0">{svg}</div>\n'
        f"<figcaption>{escape(figure.caption)}</figcaption>\n</figure>\n"
    )
