"""The file `plan.json` of a grid, which says what its rows are. It is written with a hash of its contents, so that a report never
describes results by a plan that was changed afterwards.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cora_cli import rundir
from cora_cli.errors import CoraError
from cora_cli.reading import read_json

PLAN = "plan.json"
_HASH = "sha256"


def write_plan_file(out: Path, record: Mapping[str, Any]) -> None:
    """Write `record`, the plan of the grid in `out`, with its hash."""
    as_read = json.loads(json.dumps(record))  # where every key is text
    rundir.write_json(out / PLAN, {**record, _HASH: rundir.sha256_json(as_read)})


def read_plan_file(out: Path) -> dict[str, Any]:
    """The plan of the grid in `out`, as it was written; earlier versions wrote no hash.

    Raises `CoraError` if the file is missing, is no JSON object, or was changed since.
    """
    record: dict[str, Any] = read_json(out / PLAN, dict[str, Any])
    written = record.pop(_HASH, None)
    if written is not None and written != rundir.sha256_json(record):
        raise CoraError(f"{out / PLAN} was changed after `cora ablate` had written it")
    return record
