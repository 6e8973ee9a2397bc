"""Seeds that a grid gets after results of others existed."""

from pathlib import Path
from typing import Any

import pytest

from cora_cli.experiments.later_seeds import seeds_before
from cora_cli.reading import read_json
from cora_cli.records import write_sealed
from cora_cli.reporting.report import report
from cora_cli.rundir import RunDirectory
from tests.reporting.helpers import Made, make_grid


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """Three finished seeds of two methods."""
    return make_grid(tmp_path, [Made(mode, mode, seed=seed) for mode in ("lora", "fb") for seed in range(3)], prompts=6)


def with_seed(plan: dict[str, Any], seed: int, **changes: Any) -> dict[str, Any]:
    row = {**plan["rows"][0], "name": f"seed {seed}", "seed": seed, "run": f"runs/{seed}", **changes}
    return {**plan, "rows": [*plan["rows"], row]}


def test_a_seed_that_is_added_to_finished_ones_is_noticed_once_and_kept(grid: Path) -> None:
    plan = read_json(grid / "plan.json")
    assert seeds_before(grid, plan) == []
    more = with_seed(plan, 3)
    assert seeds_before(grid, more) == [3]
    write_sealed(grid / "plan.json", {**more, "seeds_before": [3]})
    assert seeds_before(grid, more) == [3]
    assert seeds_before(grid, with_seed(more, 4)) == [3, 3]  # the fourth has no results


@pytest.mark.parametrize("changes", [{"label": "other"}, {"learning_rate": 0.5}, {"stage": "sweep"}, {"run": None}])
def test_a_row_of_another_method_rate_or_stage_adds_no_seed(grid: Path, changes: dict[str, Any]) -> None:
    assert seeds_before(grid, with_seed(read_json(grid / "plan.json"), 3, **changes)) == []


def test_a_seed_that_is_added_to_averages_is_noticed(grid: Path) -> None:
    plan = read_json(grid / "plan.json")
    averages = {**plan, "rows": [{**row, "run": None, "members": [row["run"]]} for row in plan["rows"]]}
    write_sealed(grid / "plan.json", averages)
    assert seeds_before(grid, with_seed(averages, 3, run=None, members=["runs/3", "runs/1003"])) == [3]


def test_seeds_that_are_added_before_any_result_are_none_too_many(grid: Path, tmp_path: Path) -> None:
    plan = read_json(grid / "plan.json")
    for row in plan["rows"]:
        RunDirectory(grid / row["run"]).record.unlink()
    assert seeds_before(grid, with_seed(plan, 3)) == []
    assert seeds_before(tmp_path / "new", plan) == []


def test_more_looks_than_were_planned_are_more_seeds(grid: Path) -> None:
    plan = read_json(grid / "plan.json")
    staged = {**plan, "looks": 3, "rows": [{**row, "stage": "confirm"} for row in plan["rows"]]}
    write_sealed(grid / "plan.json", staged)
    assert seeds_before(grid, with_seed(staged, 3, stage="confirm")) == []
    assert seeds_before(grid, {**staged, "looks": 2}) == []
    assert seeds_before(grid, {**staged, "looks": 4}) == [3]  # of five that were planned at most
    for row in plan["rows"]:
        RunDirectory(grid / row["run"]).record.unlink()
    assert seeds_before(grid, {**staged, "looks": 4}) == []


def test_confirming_seeds_that_a_finished_grid_gets_are_more_seeds(grid: Path) -> None:
    plan = read_json(grid / "plan.json")
    confirmed = [{**row, "stage": "confirm", "learning_rate": 0.5} for row in plan["rows"]]
    begun = {**plan, "looks": 3, "rows": confirmed}
    assert seeds_before(grid, begun) == []
    assert seeds_before(grid, with_seed(begun, 3)) == [3]
    for row in plan["rows"]:
        RunDirectory(grid / row["run"]).record.unlink()
    assert seeds_before(grid, with_seed(begun, 3)) == []


def test_confirming_seeds_are_more_where_one_learning_rate_of_the_finished_grid_diverged(grid: Path) -> None:
    plan = read_json(grid / "plan.json")
    lost = [{**row, "name": f"lost {row['name']}", "run": f"lost/{row['run']}", "learning_rate": 1.0} for row in plan["rows"]]
    write_sealed(grid / "plan.json", {**plan, "rows": [*plan["rows"], *lost]})
    begun = {**plan, "looks": 3, "rows": [{**row, "stage": "confirm", "learning_rate": 0.5} for row in plan["rows"]]}
    assert seeds_before(grid, with_seed(begun, 3)) == [3]


def test_a_seed_that_is_added_to_finished_ensembles_is_noticed(grid: Path) -> None:
    plan = read_json(grid / "plan.json")
    ensembles = {**plan, "rows": [{**row, "run": None, "members": [row["run"]]} for row in plan["rows"]]}
    write_sealed(grid / "plan.json", ensembles)
    assert seeds_before(grid, with_seed(ensembles, 3, run=None, members=["runs/3"])) == [3]


def test_a_report_says_that_seeds_were_added(grid: Path) -> None:
    assert "Seeds were added" not in report([str(grid)])
    write_sealed(grid / "plan.json", {**read_json(grid / "plan.json"), "seeds_before": [3, 5]})
    assert "Seeds were added when 3 and then 5 per method had results." in " ".join(report([str(grid)]).split())
