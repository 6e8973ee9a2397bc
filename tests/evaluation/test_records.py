"""Records carry the hash of their contents, and one that was edited is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cora_cli import writing
from cora_cli.errors import CoraError
from cora_cli.models.references import resolve_model
from cora_cli.publishing.verify import verify
from cora_cli.reading import read_json
from cora_cli.records import read_run, read_sealed, write_sealed
from cora_cli.rundir import RunDirectory

from .helpers import evaluate_run, unsealed

NAMES = st.text(max_size=3)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(NAMES, VALUES, max_size=4), NAMES, VALUES)
def test_a_record_is_read_as_it_was_written_and_one_with_another_value_is_refused(
    tmp_path_factory: pytest.TempPathFactory, record: dict[str, Any], name: str, value: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "record.json"
    write_sealed(path, record)
    assert read_sealed(path) == record
    writing.write_json(path, {**read_json(path), name: value})
    if name in record and json.dumps(value, sort_keys=True) == json.dumps(record[name], sort_keys=True):
        assert read_sealed(path) == record
    else:
        with pytest.raises(CoraError, match=r"record.json was changed after it was written; restore it"):
            read_sealed(path)
    writing.write_json(path, unsealed(path))
    assert read_sealed(path) == {**record, name: value}, "earlier versions wrote no hash"


@pytest.mark.parametrize(
    "reads",
    [lambda run: read_run(RunDirectory(run)), verify, lambda run: resolve_model(str(run)), evaluate_run],
    ids=["read", "verify", "model", "evaluate"],
)
def test_another_setting_in_the_record_of_a_run_is_refused(run: Path, reads: Callable[[Path], Any]) -> None:
    record = read_json(run / "run.json")
    record["fingerprint"]["settings"]["warmup_ratio"] = 0.5
    writing.write_json(run / "run.json", record)
    with pytest.raises(CoraError, match=r"run.json was changed after it was written; restore it"):
        reads(run)


def test_another_setting_in_the_record_of_a_generation_is_refused_and_answers_given_anew_replace_it(run: Path) -> None:
    evaluate_run(run)
    path = run / "eval" / "generation.json"
    record = read_json(path)
    record["settings"]["batch_size"] = 3
    writing.write_json(path, record)
    with pytest.raises(CoraError, match=r"generation.json was changed after it was written; restore it$"):
        verify(run)
    with pytest.raises(CoraError, match=r"generation.json was changed .*; restore it \(--overwrite answers again\)$"):
        evaluate_run(run)
    evaluate_run(run, overwrite=True)
    verify(run)
