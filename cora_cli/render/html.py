"""Writes documents as one self-contained HTML page: no network, embedded figures and scripts, usable on a phone and in dark mode.

All text is escaped or packed; only the SVG of the figures, which this package drew, and the files in `assets` are inserted unchanged.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from cora_cli.render import assets
from cora_cli.render.answers import LARGEST_BYTES, AnswerSet, pack
from cora_cli.render.canvas import INK, Figure
from cora_cli.render.document import Block, Heading, Items, Text
from cora_cli.render.table import Cell, Table

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""A browser loads nothing from anywhere for the page."""


def page(documents: Sequence[Iterable[Block]], title: str, version: str, answers: Sequence[AnswerSet] = ()) -> str:
    """One page with several documents, one after the other, and the answers of runs at the end."""
    sections = [list(blocks) for blocks in documents]
    headings = [block for blocks in sections for block in blocks if isinstance(block, Heading)]
    if answers:
        headings.append(Heading(2, "Answers"))
    places = {id(heading): f"part-{number}" for number, heading in enumerate(headings, start=1)}
    body = "\n".join(f"<section>\n{''.join(_block(block, places) for block in blocks)}</section>" for blocks in sections)
    if answers:
        body += f"\n<section>\n{_block(headings[-1], places)}{_answers(answers)}</section>"
    scripts = [assets.read("tables.js"), *([assets.read("answers.js")] if answers else [])]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{assets.read('page.css')}</style>\n</head>\n<body>\n{_contents(headings, places)}<main>\n{body}\n</main>\n"
        f'<footer class="note">Created by cora {escape(version)}.</footer>\n'
        + "".join(f"<script>\n{script}</script>\n" for script in scripts)
        + "</body>\n</html>\n"
    )


def _contents(headings: Sequence[Heading], places: Mapping[int, str]) -> str:
    """A list of links to the headings; none where there are fewer than three."""
    if len(headings) < 3:
        return ""
    items = "".join(f'<li><a href="#{places[id(heading)]}">{escape(heading.text)}</a></li>\n' for heading in headings)
    return f'<nav aria-label="Contents">\n<ol>\n{items}</ol>\n</nav>\n'


def _answers(answers: Sequence[AnswerSet]) -> str:
    """The packed answers, for the script to show; they share the room that the page has for them."""
    room = LARGEST_BYTES // len(answers)
    return "".join(
        f'<h3>{escape(each.title)}</h3>\n<div class="answers" id="answers-{number}">\n<p class="note status">This part needs a script, which '
        f'is in the page.</p>\n<script type="application/octet-stream">{pack(each, room)}</script>\n</div>\n'
        for number, each in enumerate(answers, start=1)
    )


def _block(block: Block, places: Mapping[int, str]) -> str:
    if isinstance(block, Heading):
        return f'<h{block.level} id="{places[id(block)]}">{escape(block.text)}</h{block.level}>\n'
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
