"""A data file of each format, and the error of one that cannot be read."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, settings

from cora_cli.data.split import load_records
from cora_cli.errors import CoraError

repeatable = settings(
    derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
TALK = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
SAID = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def jsonl(path: Path, *records: dict[str, Any]) -> str:
    return str(write(path, list(records)))


def failure(path: Path, content: str | None = None) -> str:
    """The message for a file, which is one line, is a plain CoraError, and names the file."""
    if content is not None:
        path.write_bytes(content.encode())
    with pytest.raises(CoraError) as caught:
        load_records(str(path))
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message
