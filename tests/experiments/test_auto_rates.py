"""Grids with `learning_rate: auto`: what is measured first, the sweep around it, and what such a grid does not allow."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cora_cli import writing
from cora_cli.errors import CoraError, UsageError
from cora_cli.experiments.estimate import estimate_steps
from cora_cli.experiments.execute import Outcome
from cora_cli.experiments.grid import Grid
from cora_cli.experiments.inputs import data_key
from cora_cli.experiments.stage_work import stage_lines
from cora_cli.experiments.stages import Stages
from cora_cli.experiments.steps import StepFlags
from cora_cli.reading import read_json
from cora_cli.training.proposal import rates_around

from .helpers import PretendLauncher, SweepLauncher, grid_of, inputs_of, plan_of, run_staged, staged_grid, value_of

pytestmark = pytest.mark.usefixtures("quick")

PROPOSED = {"lora": 2e-3, "fb": 7e-4}
FB = {"mode": "fb", "sources": ["c"], "learning_rate": "auto"}
GRID = ({"mode": "base"}, {"mode": "lora", "learning_rate": "auto"}, FB)


class Launcher(SweepLauncher):
    """As `SweepLauncher`; what measures curvature proposes `PROPOSED`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(lambda mode, rate, step: 1 + abs(rate / PROPOSED[mode] - 1), **options)

    def _make(self, argv: Sequence[str]) -> None:
        if "--probe" in argv:
            place = Path(value_of(argv, "--probe"))
            if place.exists():
                raise AssertionError("cora train --probe writes over nothing")
            rate = PROPOSED[value_of(argv, "--mode", "fb")]
            numbers = {"constant": 3e-3, "examples": 4, "largest_eigenvalue": 1.0, "error": 0.0, "products": 8}
            writing.write_json(place, {"proposal": {"learning_rate": rate, **numbers}})
        elif argv[0] == "extract-basis":
            PretendLauncher._make(self, argv)
        else:
            super()._make(argv)

    def measured(self) -> list[tuple[str, ...]]:
        return [argv for argv in self.submitted if "--probe" in argv]

    def rates(self, mode: str, seed: str) -> set[float]:
        return {
            float(rate)
            for of, rate, own, _ in self.trained()
            if (of or "fb") == mode and own == seed and rate not in ("", "auto")
        }


def run_auto(tmp_path: Path, launcher: Launcher, *blocks: Any) -> Outcome:
    return run_staged(staged_grid(*(blocks or GRID)), tmp_path, launcher)


def test_each_method_is_swept_around_its_own_proposal_and_confirmed_at_the_best_rate(tmp_path, capsys):
    launcher = Launcher()
    outcome = run_auto(tmp_path, launcher)
    assert not outcome.failed
    assert {value_of(argv, "--mode", "fb") for argv in launcher.measured()} == {"lora", "fb"}
    assert all(
        value_of(argv, "--seed") == "100" and value_of(argv, "--learning-rate") == "auto" for argv in launcher.measured()
    )
    for mode, rate in PROPOSED.items():
        assert launcher.rates(mode, "100") == set(rates_around(rate))
        assert launcher.rates(mode, "0") == {rate}
    plan = read_json(tmp_path / "plan.json", dict[str, Any])
    assert [sweep["planned"] for sweep in plan["sweeps"]] == [sorted(rates_around(rate)) for rate in PROPOSED.values()]
    assert all(row["stage"] != "proposal" and row["learning_rate"] != "auto" for row in plan["rows"])
    said = capsys.readouterr().err
    assert "lora: learning rate 2e-3 proposed from curvature, so 7e-4, 2e-3, 7e-3 are swept" in said
    order = [step for step in launcher.submitted if step[0] == "extract-basis" or "--probe" in step]
    fb = next(argv for argv in launcher.measured() if value_of(argv, "--mode", "fb") == "fb")
    assert value_of(fb, "--basis") in order[order.index(fb) - 1], "a basis is there before what is measured of it"


def test_a_finished_grid_measures_nothing_again(tmp_path):
    run_auto(tmp_path, Launcher())
    again = Launcher()
    run_auto(tmp_path, again)
    assert not again.submitted


def test_an_edited_proposal_is_measured_again_and_its_sweep_kept(tmp_path):
    run_auto(tmp_path, Launcher())
    (edited,) = (path for path in (tmp_path / "proposals").iterdir() if path.name.startswith("lora"))
    edited.write_text(edited.read_text().replace("0.002", "0.05"))
    again = Launcher()
    outcome = run_auto(tmp_path, again)
    assert not outcome.failed
    assert [argv[0] for argv in again.submitted] == ["train"]
    assert again.measured() == again.submitted


def test_a_proposal_that_fails_fails_the_grid_and_confirms_nothing(tmp_path):
    launcher = Launcher(fails=lambda argv: "no curvature" if "--probe" in argv and "lora" in argv else None)
    outcome = run_auto(tmp_path, launcher)
    assert list(outcome.failed.values()) == ["no curvature"]
    assert launcher.rates("fb", "100")
    assert not launcher.rates("fb", "0")


def test_the_dry_run_counts_three_rates_around_each_proposal(tmp_path):
    grid = staged_grid(*GRID)
    stages = Stages(grid, tmp_path, inputs_of(), StepFlags("cpu", "fp32"))
    methods = stages.methods()
    rows = stages.rows(methods, {})
    assert [row.stage for row in rows] == [None, "proposal", "proposal"]
    plan = stages.plan([row for row in grid.rows if row.train is None] + [method.rows[0] for method in methods])
    lines = stage_lines(grid, methods, plan, estimate_steps(plan, inputs_of(), 1e11))
    assert (
        lines[0]
        == "first, a learning rate is proposed from curvature for 2 methods; their sweeps start with three rates around it"
    )
    assert lines[-1].startswith("at most 18 training runs"), "(3 rates, one that widens, and 5 seeds) of two methods"
    proposals = stages.plan(rows)
    known = inputs_of()
    read = dataclasses.replace(known, datasets={data_key("records", grid.train): known.datasets["records"]})
    found = estimate_steps(proposals, read, 1e11)
    assert all((found[name].seconds or 0) > 12 for name in proposals.steps if name.startswith("proposal-"))


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (lambda: grid_of({"mode": "lora", "learning_rate": "auto"}), "learning_rate auto needs a section sweep"),
        (lambda: staged_grid({"mode": "lora", "learning_rate": ["auto", 1e-3]}), "learning_rate auto stands alone"),
        (
            lambda: staged_grid(
                {"mode": "base"},
                models={"c": {"dataset": "tasks", "learning_rate": "auto"}},
                resources={"model": {"gpus": 2}},
            ),
            "models: c: learning_rate auto is measured in one process; give a number",
        ),
        (lambda: staged_grid({"mode": "full", "learning_rate": "auto"}), "--learning-rate auto does not go with mode full"),
        (lambda: staged_grid({"mode": "lora", "learning_rate": "automatic"}), "learning_rate must be a number or one of auto"),
    ],
)
def test_what_such_a_grid_does_not_allow(grid, message):
    with pytest.raises(UsageError, match=message):
        grid()


def test_a_proposal_is_measured_in_one_process_on_the_machine_of_a_training():
    grid: Grid = staged_grid(*GRID, resources={"train": {"gpus": 4, "nodes": 2, "partition": "gpu"}, "all": {"cpus": 3}})
    alone = grid.resources["proposal"]
    assert (alone.gpus, alone.nodes, alone.partition, alone.cpus, alone.processes) == (1, 1, "gpu", 3, 1)
    with pytest.raises(UsageError, match="resources: proposal: gpus must be at most 1 here"):
        staged_grid(*GRID, resources={"proposal": {"gpus": 2}})


def test_the_rate_is_no_part_of_what_a_proposal_depends_on_but_the_basis_is(tmp_path):
    plan = plan_of(staged_grid(*GRID))
    assert not [step for step in plan.steps.values() if step.kind == "proposal"], "only their own rows have one"
    stages = Stages(staged_grid(*GRID), tmp_path, inputs_of(), StepFlags("cpu", "bf16"))
    planned = stages.plan(stages.rows(stages.methods(), {}))
    (fb,) = (step for name, step in planned.steps.items() if name.startswith("proposal-cora-fb"))
    assert any(need.startswith("basis-") for need in fb.needs)
    assert "--dtype" not in fb.argv, "curvature is measured in float32"
    with pytest.raises(CoraError):
        plan_of(staged_grid({"mode": "fb", "sources": ["nobody"], "learning_rate": "auto"}))
