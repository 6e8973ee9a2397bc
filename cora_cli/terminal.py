"""The one way to the screen: text without control characters, in whatever encoding the terminal has, quiet once nobody reads.

Names, prompts and messages come from files. An escape sequence in one of them must not reach the terminal, where it could clear the
screen or rewrite a line.
"""

import contextlib
import io
import os
import re
import shutil
import sys
import unicodedata

# All but the tab and the newline; the second range holds the one-byte forms of the escape sequences.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
CLOSED_PIPE = 141
"""Exit code of a program whose reader is gone, as the shell reports it: 128 + SIGPIPE."""


def printable(text: str) -> str:
    """`text` with control characters, and marks that reverse its direction, written as escapes such as `\\x1b`."""
    return _CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def show(text: str, end: str = "\n") -> None:
    """Print a command's result on stdout, folded at words in a terminal. `say` of `progress` prints everything else."""
    width = columns()
    print(folded(printable(text), width) if width else printable(text), end=end, flush=True)


def complain(text: str) -> None:
    """Print one line on stderr, whatever process this is."""
    print(printable(text).replace("\n", " "), file=sys.stderr, flush=True)


def accept_any_text() -> None:
    """Print a replacement for characters that the terminal's encoding lacks: what was computed must not depend on it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def open_missing_streams() -> None:
    """Open the null device in place of each standard stream that the caller has closed.

    Otherwise the next file that is opened gets its number, and what a library prints there would be written into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest free number
            setattr(sys, name, os.fdopen(null, "w" if number else "r", encoding="utf-8"))


def abandon_closed_pipes() -> None:
    """Drop what is still to be printed after a reader has gone, such as `head`, or a disk is full; Python would complain about it at the end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)


def columns() -> int | None:
    """The width of the terminal that results go to; None where they go to a file or to another program."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def folded(text: str, columns: int) -> str:
    """`text` with its lines folded at words to `columns` cells; the rest of a line is indented below its text.

    What is to be copied in one piece stays so: a part in backquotes, a row of a table, a line of tokens with `|` between them.
    """
    return "\n".join(
        line if len(fitted(line, columns)) == len(line) else _folded_line(line, columns) for line in text.split("\n")
    )


def _folded_line(line: str, columns: int) -> str:
    if line.startswith("|"):
        return line
    start = re.match(r" *(\S+ {2,})?", line)
    indent = start.end() if start and start.end() <= columns // 3 else len(line) - len(line.lstrip())
    pieces = re.split(r"(?<=[^\s|]) (?=\S)(?=(?:[^`]*`[^`]*`)*[^`]*$)", line)
    folded, current = [], pieces[0]
    for piece in pieces[1:]:
        longer = f"{current} {piece}"
        alone = " " * indent + piece
        if fitted(longer, columns) == longer or fitted(alone, columns) != alone:  # a piece that fits nowhere is not moved
            current = longer
        else:
            folded.append(current)
            current = alone
    return "\n".join([*folded, current])


def fitted(line: str, columns: int) -> str:
    """The beginning of one line that fits into `columns` cells, of which a Chinese character, for example, takes two."""
    used = 0
    for place, sign in enumerate(line):
        used += 0 if unicodedata.combining(sign) else 2 if unicodedata.east_asian_width(sign) in "WF" else 1
        if used > columns:
            return line[:place]
    return line
