"""A step of a grid that read another model or other data than its plan hashed, because they were replaced after the planning."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import yaml

from cora_cli import writing
from cora_cli.errors import CoraError
from cora_cli.experiments.ledger import FAILED, Ledger
from cora_cli.models.references import resolve_model
from cora_cli.rundir import RunDirectory
from tests.experiments.helpers import grid_of, plan_of

ROW = {"mode": "lora", "dataset": "data"}


@pytest.mark.parametrize("changed", ["model", "dataset"])
def test_a_run_on_other_inputs_than_the_plan_s_is_no_result(changed: str, tmp_path: Path) -> None:
    (step,) = (step for step in plan_of(grid_of(ROW), tmp_path).steps.values() if step.kind == "train")
    run, ledger = tmp_path / step.output, Ledger(tmp_path)
    hashes = {"model_sha256": step.facts["model"], "data_sha256": step.facts["dataset"]}
    other = {"model": "model_sha256", "dataset": "data_sha256"}[changed]
    ledger.start(step, {})
    writing.write_json(run / "run.json", {"status": "finished", "fingerprint": {**hashes, other: "another"}})
    with pytest.raises(CoraError, match=f"the {changed} was changed after the grid had been planned, .* its run is removed"):
        ledger.finish(step, {}, 1.0)
    ledger.fail(step, {}, "changed")
    assert not run.exists()
    assert ledger.record(step)["status"] == FAILED

    writing.write_json(run / "run.json", {"status": "finished", "fingerprint": hashes})
    ledger.finish(step, {}, 1.0)
    assert ledger.check(step, {}).done


def test_a_run_that_an_earlier_version_began_counts_by_the_hash_of_that_version(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    shutil.copy(model / "model.safetensors", model / "consolidated.safetensors")  # never read, but hashed by earlier versions
    hashes = resolve_model(str(model)).content_hashes()
    now = resolve_model(str(model)).content_hash()
    (earlier,) = hashes - {now}
    (planned,) = (step for step in plan_of(grid_of(ROW), tmp_path).steps.values() if step.kind == "train")
    step = dataclasses.replace(planned, facts={**planned.facts, "model": now})
    run = RunDirectory(tmp_path / step.output)
    read = {"model_sha256": earlier, "data_sha256": step.facts["dataset"]}
    writing.write_json(run.record, {"status": "finished", "fingerprint": read})
    writing.write_text(run.config, yaml.safe_dump({"model": str(model)}))
    ledger = Ledger(tmp_path)
    ledger.start(step, {})
    assert ledger.finish(step, {}, 1.0)


def test_the_limit_of_a_row_does_not_count_as_other_data(tmp_path: Path) -> None:
    grid = grid_of({**ROW, "limit": 2})
    (step,) = (step for step in plan_of(grid, tmp_path).steps.values() if step.kind == "train")
    read = {"model_sha256": step.facts["model"], "data_sha256": "of the first two records"}
    writing.write_json(tmp_path / step.output / "run.json", {"status": "finished", "fingerprint": read})
    ledger = Ledger(tmp_path)
    ledger.start(step, {})
    assert ledger.finish(step, {}, 1.0)
