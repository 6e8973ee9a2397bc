"""`cora list`: show the runs, evaluations and bases below a folder."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cora_cli.cli.command import command
from cora_cli.cli.next_step import say_next
from cora_cli.settings import setting
from cora_cli.terminal import columns, fitted, show

if TYPE_CHECKING:
    from cora_cli.reporting.inventory import Entry


@dataclasses.dataclass(frozen=True)
class ListConfig:
    """Every setting of `cora list`."""

    folder: str = setting("Folder to search.", ".", argument=True)
    seed: int = setting("Ignored; accepted so that all commands take the same flags.", 0)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "list", ListConfig, run)


def run(config: ListConfig) -> None:
    """List the runs, evaluations and bases below a folder."""
    from cora_cli.reporting.inventory import inventory

    root = Path(config.folder)
    found = inventory(root)
    show(table(found, root, columns()) if found else f"no runs, evaluations or bases below {root}")
    if any(entry.kind != "basis" and entry.status == "finished" for entry in found):
        say_next(None, "report", root, "-o", "report")


def table(entries: "list[Entry]", root: Path, width: int | None) -> str:
    """The entries as aligned lines; paths are cut at the left so that a line has at most `width` cells."""
    rows = [("kind", "status", "method", "result", "changed", "path")]
    for entry in entries:
        path = str(entry.path.relative_to(root)) or "."
        rows.append((entry.kind, entry.status, fitted(entry.method, 14), fitted(entry.result, 15), entry.when, path))
    widths = [max(len(row[place]) for row in rows) for place in range(5)]
    room = None if width is None else max(width - sum(widths) - 5, 8)
    return "\n".join(
        " ".join([*(cell.ljust(width) for cell, width in zip(row[:5], widths, strict=True)), _end(row[5], room)]).rstrip()
        for row in rows
    )


def _end(path: str, room: int | None) -> str:
    return path if room is None or len(path) <= room else "…" + path[len(path) - room + 1 :]
