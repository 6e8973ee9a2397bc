"""The line with which a command ends in a terminal: what it wrote, and the next sensible command."""

import shlex
import shutil
import sys
from pathlib import Path

from cora_cli.progress import say


def say_next(done: str | None, *words: object) -> None:
    """Say in a terminal what is `done` and which command comes next; a capital word stands for the user's own value.

    A command that does not fit behind it stands on a line of its own, unbroken, so that it can be copied.

    Nothing is said where the output goes to a file or to another program.
    """
    if not _in_terminal():
        return
    command = shlex.join(["cora", *map(str, words)])
    before = f"{done}; next:" if done else "next:"
    fits = len(before) + 1 + len(command) <= shutil.get_terminal_size().columns
    if fits:
        say(f"{before} {command}", folds=False)
    else:
        say(before)
        say(f"  {command}", folds=False)


def say_where_to_look(page: Path) -> None:
    """Say in a terminal which page was written, as the next thing to look at."""
    if _in_terminal():
        say(f"{page} is written; next: open it in a browser", folds=False)


def _in_terminal() -> bool:
    return sys.stdout.isatty() and sys.stderr.isatty()
