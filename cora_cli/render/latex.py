"""Writes documents as a LaTeX article with booktabs tables.

Every table is a self-contained float that can be pasted into a paper.
"""

import itertools
import re
from collections.abc import Iterable, Iterator

from cora_cli.render.canvas import Figure
from cora_cli.render.document import Block, Heading, Items, Text
from cora_cli.render.table import Cell, Table

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}\allowbreak{}",
    "[": "{[}",
    '"': r"\textquotedbl{}",
    "–": "--",
    "—": "---",
    "…": r"\ldots{}",
    "±": r"\ensuremath{\pm}",
    "×": r"\ensuremath{\times}",
    "²": r"\ensuremath{^2}",
    "‖": r"\ensuremath{\|}",
    "≥": r"\ensuremath{\geq}",
    "≤": r"\ensuremath{\leq}",
    "√": r"\ensuremath{\surd}",
    "−": r"\ensuremath{-}",
    "Δ": r"\ensuremath{\Delta}",
    "α": r"\ensuremath{\alpha}",
    "κ": r"\ensuremath{\kappa}",
    "σ": r"\ensuremath{\sigma}",
    "·": r"\ensuremath{\cdot}",
    "`": "{`}",
    "*": "{*}",  # else the end of the table's line above takes it
}
_JOINED = "-',"
"""What TeX makes another sign of where it stands twice: a dash of hyphens, quotation marks of the others."""
_MOST_INLINE = 4
"""The most numbers in a row that fit on one line with their intervals."""
_PREAMBLE = r"""\documentclass{article}
\usepackage[utf8]{inputenc}
\usepackage[T1]{fontenc}
\usepackage[margin=2cm]{geometry}
\usepackage{booktabs}
\usepackage{graphicx}
\setlength{\parindent}{0pt}
\setlength{\parskip}{6pt}
\sloppy
\begin{document}
"""


def latex(blocks: Iterable[Block]) -> str:
    """A complete document for `pdflatex`, which needs booktabs and graphicx. Figures are left out; include the written plots by hand."""
    parts = [
        part for block in blocks if not isinstance(block, Figure) and block != Heading(2, "Figures") for part in [_block(block)]
    ]
    return _PREAMBLE + "\n\n".join(parts) + "\n\n\\end{document}\n"


def latex_table(table: Table) -> str:
    """One floating table with its notes below it."""
    columns = "l" + "r" * (len(table.headers) - 1)
    if any(header == "method" for header in table.headers[1:2]):
        columns = "ll" + "r" * (len(table.headers) - 2)
    lines = [
        r"\begin{table}[htbp]",
        r"\centering\small",
        rf"\caption{{{escape(table.title)}}}",
        # Narrow tables keep their size; wide ones shrink to the line width.
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(map(escape, table.headers)) + r" \\",
        r"\midrule",
        *_rows(table),
        r"\bottomrule",
        r"\end{tabular}}",
        *(rf"\par\smallskip\parbox{{\linewidth}}{{\footnotesize {escape(note)}}}" for note in table.notes),
        r"\end{table}",
    ]
    return "\n".join(lines)


def escape(text: str) -> str:
    """Escape text so that LaTeX prints it literally. Characters that plain pdfLaTeX lacks become their code point."""
    signs = itertools.pairwise([*text, ""])
    return "".join(
        f"{sign}{{}}" if sign in _JOINED and sign == after else _SPECIAL.get(sign) or _plain(sign) for sign, after in signs
    )


def _plain(sign: str) -> str:
    # The T1 encoding has accented Latin letters. Any other character in a name must not stop the compiler.
    if sign.isascii() and not sign.isprintable():
        return " "
    return sign if sign.isascii() or re.match(r"[À-ÖØ-öø-ÿ]", sign) else f"[U+{ord(sign):04X}]"


def _rows(table: Table) -> Iterator[str]:
    """The table body. If a row has too many numbers for one line, intervals and published numbers go on lines of their own below."""
    wide = max((sum(cell.is_number for cell in row) for row in table.rows), default=0) > _MOST_INLINE
    for row in table.rows:
        if not wide:
            yield _line(_value(cell) + _interval(cell) + _printed(cell, "~") for cell in row)
            continue
        yield _line(map(_value, row))
        for below in (_interval, _printed):
            if any(below(cell) for cell in row):
                yield _line(rf"{{\scriptsize {below(cell)}}}" if below(cell) else "" for cell in row)
        yield r"\addlinespace"


def _line(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _value(cell: Cell) -> str:
    if not cell.is_number:
        return escape(cell.text)
    return rf"$\mathbf{{{cell.text}}}$" if cell.bold else f"${cell.text}$"


def _interval(cell: Cell) -> str:
    if not cell.is_number:
        return ""
    interval = cell.interval.replace("± ", r"\pm ").replace(", ", r",\,")
    return f"$\\,{interval}$" if interval.startswith("[") else f"${{}}{interval}$"


def _printed(cell: Cell, before: str = "") -> str:
    return "" if cell.published is None else f"{before}{cell.printed}"


def _block(block: Block) -> str:
    if isinstance(block, Heading):
        return rf"\{'section' if block.level == 1 else 'subsection'}*{{{escape(block.text)}}}"
    if isinstance(block, Items):
        return "\n".join([r"\begin{itemize}", *(rf"\item {{}}{escape(item)}" for item in block.items), r"\end{itemize}"])
    if isinstance(block, Table):
        return latex_table(block)
    assert isinstance(block, Text)
    return rf"\textbf{{{escape(block.text)}}}" if block.kind == "verdict" else escape(block.text)
