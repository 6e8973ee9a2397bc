"""One date in the prompts of a complete grid, on whichever days its steps run."""

import dataclasses
from pathlib import Path

import pytest

from cora_cli import writing
from cora_cli.data import templates
from cora_cli.experiments import dates
from cora_cli.experiments.execute import write_plan
from cora_cli.experiments.grid import Grid
from cora_cli.experiments.inputs import Inputs, find_inputs
from cora_cli.experiments.steps import Plan, StepFlags, make_plan
from tests.experiments.helpers import grid_of, inputs_of, plan_of


@pytest.fixture
def day(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list whose last entry is today."""
    days = ["2030-01-01"]
    for module in (templates, dates):
        monkeypatch.setattr(module, "today", lambda: days[-1])
    return days


def dated_inputs() -> Inputs:
    """The inputs of the small grid, with a chat template that writes the date."""
    inputs = inputs_of()
    return dataclasses.replace(inputs, models={**inputs.models, "base": dataclasses.replace(inputs.models["base"], dated=True)})


def dated_plan(grid: Grid, out: Path) -> Plan:
    return make_plan(grid, out, dated_inputs(), StepFlags("cpu", "fp32"))


def date_in(argv: tuple[str, ...]) -> str | None:
    return argv[argv.index("--template-date") + 1] if "--template-date" in argv else None


ROWS = ({"mode": "base"}, {"mode": "fb", "sources": ["c"]}, {"mode": "lora", "seed": [0, 1]})


def test_all_steps_of_a_grid_get_the_date_of_its_first_day(day: list[str], tmp_path: Path) -> None:
    write_plan(dated_plan(grid_of(*ROWS), tmp_path))
    day.append("2030-01-02")
    plan = dated_plan(grid_of(*ROWS), tmp_path)
    found = {name: date_in(step.argv) for name, step in plan.steps.items() if step.kind in {"train", "model"}}
    found |= {name: date_in(step.argv) for name, step in plan.steps.items() if name.startswith("evaluate-base")}
    assert len(found) == 5
    assert set(found.values()) == {"2030-01-01"}


def test_the_date_leaves_finished_steps_done(day: list[str], tmp_path: Path) -> None:
    undated = plan_of(grid_of(*ROWS), tmp_path)
    dated = dated_plan(grid_of(*ROWS), tmp_path)
    assert {name: step.key for name, step in undated.steps.items()} == {name: step.key for name, step in dated.steps.items()}
    assert not any(date_in(step.argv) for step in undated.steps.values())


def test_a_run_that_an_earlier_version_began_keeps_its_date_and_the_others_follow_it(day: list[str], tmp_path: Path) -> None:
    grid = grid_of({"mode": "lora", "seed": [0, 1]})
    first, second = (row.name for row in grid.rows)
    writing.write_json(tmp_path / "runs" / first / "run.json", {"damaged": True})
    assert date_in(dated_plan(grid, tmp_path).steps[f"train-{first}"].argv) == "2030-01-01"
    day.append("2030-01-05")
    _begin(tmp_path / "runs" / first, "2029-12-30")
    plan = dated_plan(grid, tmp_path)
    assert [date_in(plan.steps[f"train-{name}"].argv) for name in (first, second)] == ["2029-12-30"] * 2
    _begin(tmp_path / "runs" / second, "2029-12-31")
    plan = dated_plan(grid, tmp_path)
    assert [date_in(plan.steps[f"train-{name}"].argv) for name in (first, second)] == ["2029-12-30", "2029-12-31"]


def _begin(run: Path, date: str) -> None:
    counts = {"records": 1, "tokens": 1, "response_tokens": 1, "truncated": 0, "dropped": 0}
    settings = {"learning_rate": 1e-4, "batch_size": 1, "gradient_accumulation": 1}
    record = {
        "status": "running",
        "started": "2029-01-01T00:00:00+00:00",
        "mode": "lora",
        "plan": None,
        "fingerprint": {"settings": settings, "model_sha256": "", "data_sha256": ""},
        "model": {"reference": "base", "revision": None},
        "basis": None,
        "parameters": {"trained": 1, "total": 1},
        "data": {"dataset": "records", "template": "chat", "template_date": date, "train": counts, "test": counts},
        "hardware": {"device": "cpu", "device_reason": "", "dtype": "fp32", "dtype_reason": "", "threads": 1},
        "versions": {},
        "seeds": {"seed": 0, "split_seed": 0},
    }
    writing.write_json(run / "run.json", record)


def test_a_date_in_the_grid_file_holds_for_the_base_model_too(day: list[str], tmp_path: Path) -> None:
    keys = set()
    for date in ("2031-05-05", "2031-05-06"):
        train = {"max_steps": 4, "rank": 4, "template_date": date}
        plan = dated_plan(grid_of(*ROWS, defaults={"train": train, "evaluate": {"limit": 3}}), tmp_path)
        base = next(step for step in plan.steps.values() if step.name.startswith("evaluate-base"))
        lora = next(step for step in plan.steps.values() if step.name.startswith("train-lora"))
        assert date_in(base.argv) == date_in(lora.argv) == date
        keys.add(base.key)
    assert len(keys) == 2, "another date is asked for in other prompts"


def test_a_template_without_a_date_gets_none(day: list[str], tmp_path: Path) -> None:
    grid = grid_of(*ROWS, defaults={"train": {"max_steps": 4, "rank": 4, "template": "alpaca"}, "evaluate": {"limit": 3}})
    plan = dated_plan(grid, tmp_path)
    own = next(step for step in plan.steps.values() if step.kind == "model")  # its settings have another template
    assert [step.name for step in plan.steps.values() if date_in(step.argv)] == [own.name]


def test_models_whose_chat_template_reads_the_clock_are_recognised(
    dated_model: Path, tiny_model: Path, tiny_data: Path
) -> None:
    for model, dated in ((dated_model, True), (tiny_model, False)):
        inputs = find_inputs(grid_of({"mode": "lora"}, model=str(model), datasets={"data": str(tiny_data)}), None)
        assert inputs.models[str(model)].dated is dated
