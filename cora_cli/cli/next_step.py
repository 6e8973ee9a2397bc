"""The line with which a command ends in a terminal: what it wrote, and the next sensible command."""

import shlex
import sys

from cora_cli.progress import say


def say_next(written: str | None, *words: object) -> None:
    """Say in a terminal what was written and which command comes next; a capital word stands for the user's own value.

    Nothing is said where the output goes to a file or to another program.
    """
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        return
    command = shlex.join(["cora", *map(str, words)])
    say(f"{written} is written; next: {command}" if written else f"next: {command}")
