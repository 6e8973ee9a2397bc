"""Writes a report again whenever what it is about has changed, until no grid or run that it is about goes on."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cora_cli import hashing
from cora_cli.lock import is_held
from cora_cli.progress import say
from cora_cli.reporting.found import opened
from cora_cli.reporting.inventory import OPAQUE, folders_below
from cora_cli.reporting.report import FILES, NothingToReport, compose

_LINE_BY_LINE = (".jsonl", ".log")
"""Endings of files that grow while a step runs; what is complete has a file of its own."""


def watch(
    outputs: Sequence[str],
    output_dir: Path,
    metrics: tuple[str, ...] | None,
    every: float,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Write the report into `output_dir` at once and again after each change, looking every so many seconds.

    It goes on while a command works on the `outputs`, and otherwise until all rows are finished. Raises `CoraError` as `report.compose` does,
    except that it waits where nothing is finished yet.
    """
    seen, shown, ran, complete = None, "", False, False
    while True:
        # In this order: what is written last, before a command ends, must be seen.
        runs = any(is_held(Path(place)) for place in opened(outputs))
        if (state := _state(outputs, output_dir)) != seen:
            seen = state
            try:
                composed = compose(outputs, metrics)
            except NothingToReport as error:
                if ran and not runs:
                    raise
                if not shown:
                    say(f"waiting: {error}")
                    shown = "nothing"
            else:
                complete = composed.finished == composed.rows
                # The numbers decide, not the drawing.
                if (now := hashing.sha256_text(composed.texts["json"]())) != shown:
                    shown = now
                    composed.write(output_dir)
                    say(f"{output_dir / FILES['html']}: {composed.finished} of {composed.rows} rows are finished")
        if not runs and (ran or complete):
            return
        ran = ran or runs
        pause(every)


def _state(outputs: Sequence[str], output_dir: Path) -> dict[str, tuple[int, int]]:
    """Time of the last change, in nanoseconds, and size of every complete file that a report could read."""
    found = {}
    for output in outputs:
        for folder, files in folders_below(Path(output), OPAQUE - {"judge"}):
            if output_dir.resolve() in (place := folder.resolve(), *place.parents):
                continue
            for path in (folder / name for name in files if not name.endswith(_LINE_BY_LINE)):
                try:
                    status = path.stat()
                except OSError:  # replaced at this moment
                    continue
                found[str(path)] = (status.st_mtime_ns, status.st_size)
    return found
