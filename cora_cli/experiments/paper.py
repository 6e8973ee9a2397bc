"""The results printed in the paper (arXiv 2409.02119v1), with its spelling of names.

They are for comparison only, and kept separate from results measured with this program.
"""

import functools
import importlib.resources
import json
from typing import Any

from cora_cli.errors import CoraError


@functools.cache
def paper() -> dict[str, Any]:
    """The paper's results: `source`, `model`, `note`, and `tables` by name.

    Each table has `caption`, `columns` and `rows`, which map a printed name to its metrics; a metric that is not printed is
    null. SacreBLEU is 0-100, the other metrics 0-1. Names are as printed, including `yhama` and `FBL`.
    """
    text = importlib.resources.files("cora_cli.experiments").joinpath("paper_tables.json").read_text(encoding="utf-8")
    contents: dict[str, Any] = json.loads(text)
    return contents


def paper_tables() -> dict[str, Any]:
    """The paper's tables by name; see `paper` for their contents."""
    tables: dict[str, Any] = paper()["tables"]
    return tables


def paper_row(table: str | None, printed: str | None) -> dict[str, float]:
    """The printed value of each metric; empty if the paper has no such row. Metrics that are not printed are left out.

    Raises `CoraError` if the paper has no such `table`.
    """
    if table is None:
        return {}
    tables = paper_tables()
    if table not in tables:
        raise CoraError(f"the paper has no table {table!r}; its tables are {', '.join(tables)}")
    numbers = tables[table]["rows"].get(printed, {})
    return {name: number for name, number in numbers.items() if number is not None}
