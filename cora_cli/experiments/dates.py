"""The date that a chat template writes into the prompts of a grid: one for all of its steps, however many days they take.

It is fixed when the grid starts and kept in `plan.json`.
"""

import contextlib
from pathlib import Path

from cora_cli.errors import CoraError
from cora_cli.records import PLAN, read_run, read_sealed, template_date
from cora_cli.rundir import RunDirectory
from cora_cli.settings import check_date, today


def date_of_grid(out: Path) -> str:
    """The date of the grid in `out`, as YYYY-MM-DD: the recorded one, else that of the first of its runs, else today.

    Earlier versions did not record it, so their rows have the dates of the days on which they started.
    """
    with contextlib.suppress(CoraError):
        recorded = read_sealed(out / PLAN).get("template_date")
        if isinstance(recorded, str) and check_date(recorded) is None:
            return recorded
    runs = (RunDirectory(record.parent) for folder in ("runs", "models") for record in sorted(out.glob(f"{folder}/*/run.json")))
    return min((date for run in runs if (date := date_of_run(run))), default=today())


def date_of_run(run: RunDirectory) -> str | None:
    """The date in the prompts of a run that has begun; None where there is none, or its record is damaged."""
    if not run.exists():
        return None
    with contextlib.suppress(CoraError):
        return template_date(read_run(run))
    return None
