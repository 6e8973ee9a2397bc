"""The numbers printed in the paper (arXiv 2409.02119v1), under the spellings that it uses.

They are facts to compare with, kept apart from anything measured here.
"""

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def paper_tables() -> dict[str, Any]:
    """Per table `caption`, `columns` and `rows`: printed name -> metric -> number, null where none is printed.

    SacreBLEU is 0-100, the other metrics 0-1; names are as printed (`yhama` and `FBL` among them).
    """
    text = files("cora_cli.experiments").joinpath("paper_tables.json").read_text(encoding="utf-8")
    tables: dict[str, Any] = json.loads(text)["tables"]
    return tables
