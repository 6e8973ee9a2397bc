"""The numbers printed in the paper (arXiv 2409.02119v1), under the spellings that it uses.

They are facts to compare with, kept apart from anything measured here.
"""

import functools
import importlib.resources
import json
from typing import Any

from cora_cli.errors import CoraError


@functools.cache
def paper() -> dict[str, Any]:
    """`source`, `model`, `note`, and `tables`, each with `caption`, `columns` and `rows`: printed name -> metric -> number, null where
    none is printed.

    SacreBLEU is 0-100, the other metrics 0-1; names are as printed (`yhama` and `FBL` among them).
    """
    text = importlib.resources.files("cora_cli.experiments").joinpath("paper_tables.json").read_text(encoding="utf-8")
    contents: dict[str, Any] = json.loads(text)
    return contents


def paper_tables() -> dict[str, Any]:
    """The paper's tables by name: see `paper`."""
    tables: dict[str, Any] = paper()["tables"]
    return tables


def paper_row(table: str | None, printed: str | None) -> dict[str, float]:
    """Metric -> number as printed; empty for a row that the paper does not have, and without what it left out.

    Raises `CoraError` where `table` is none of the paper's.
    """
    if table is None:
        return {}
    tables = paper_tables()
    if table not in tables:
        raise CoraError(f"the paper has no table {table!r}; its tables are {', '.join(tables)}")
    numbers = tables[table]["rows"].get(printed, {})
    return {name: number for name, number in numbers.items() if number is not None}
