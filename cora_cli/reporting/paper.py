"""The numbers that the paper prints (arXiv 2409.02119v1, Llama-2-13B), kept beside the package as `paper_tables.json`.

They are quoted as they stand, misspelt row names included; nothing here judges them.
"""

import functools
import importlib.resources
import json
from typing import Any

from cora_cli.errors import CoraError


@functools.cache
def paper_tables() -> dict[str, Any]:
    """The whole file: `source`, `model`, `note`, and under `tables` a `caption`, `columns` and `rows` for each key."""
    text = importlib.resources.files("cora_cli.reporting").joinpath("paper_tables.json").read_text(encoding="utf-8")
    tables: dict[str, Any] = json.loads(text)
    return tables


def paper_row(table: str | None, printed: str | None) -> dict[str, float]:
    """Metric -> number as printed; empty for a row that the paper does not have, and without what it left out.

    Raises `CoraError` where `table` is none of the paper's.
    """
    if table is None:
        return {}
    tables = paper_tables()["tables"]
    if table not in tables:
        raise CoraError(f"the paper has no table {table!r}; its tables are {', '.join(tables)}")
    numbers = tables[table]["rows"].get(printed, {})
    return {name: number for name, number in numbers.items() if number is not None}
