"""Rows of a grid whose runs are averaged: ensembles and Laplace approximations."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cora_cli.errors import UsageError
from cora_cli.experiments.estimate import estimate_steps
from cora_cli.experiments.execute import done_steps
from cora_cli.experiments.steps import Plan
from cora_cli.reading import read_json
from cora_cli.reporting.collect import collect
from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.report_rows import read_plan
from tests.experiments.helpers import PretendLauncher, grid_of, inputs_of, plan_of, run_plan

pytestmark = pytest.mark.usefixtures("quick")

LAPLACE = {"limit": 8, "directions": 4}


def steps(plan: Plan, kind: str) -> dict[str, tuple[str, ...]]:
    """Name and needs of every step of a kind."""
    return {step.name: step.needs for step in plan.steps.values() if step.kind == kind}


def test_an_ensemble_trains_its_members_and_shares_the_first_one_with_the_plain_row() -> None:
    plan = plan_of(grid_of({"mode": "lora", "seed": [0, 1]}, {"mode": "lora", "seed": [0, 1], "ensemble": 3}))
    seeds = [0, 1, 1000, 1001, 2000, 2001]
    assert sorted(steps(plan, "train")) == sorted(f"train-lora_r4_lr3e-4_seed{seed}" for seed in seeds)
    members = {f"train-lora_r4_lr3e-4_seed{seed}" for seed in (1, 1001, 2001)}
    assert set(steps(plan, "evaluate")["evaluate-ensemble-lora_r4_lr3e-4_seed1"]) == members
    assert len(steps(plan, "evaluate")) == 4


def test_a_laplace_approximation_is_made_of_the_plain_row_s_run() -> None:
    plan = plan_of(grid_of({"mode": "lora"}, {"mode": "lora", "laplace": LAPLACE}))
    assert steps(plan, "train") == {"train-lora_r4_lr3e-4_seed0": ()}
    assert steps(plan, "laplace") == {"laplace-laplace-lora_r4_lr3e-4_seed0": ("train-lora_r4_lr3e-4_seed0",)}
    found = plan.steps["laplace-laplace-lora_r4_lr3e-4_seed0"]
    assert found.argv == (
        *("laplace", "out/runs/lora_r4_lr3e-4_seed0", "--output-dir", "out/runs/laplace-lora_r4_lr3e-4_seed0"),
        *("--directions", "4", "--limit", "8", "--device", "cpu"),
    )
    assert steps(plan, "evaluate")["evaluate-laplace-lora_r4_lr3e-4_seed0"] == (found.name,)


def test_draws_apply_to_a_laplace_approximation() -> None:
    defaults = {"train": {}, "evaluate": {"draws": 3}}
    plan = plan_of(grid_of({"mode": "lora"}, {"mode": "lora", "laplace": {}}, defaults=defaults))
    drawn = [step.name for step in plan.steps.values() if "--draws" in step.argv]
    assert drawn == ["evaluate-laplace-lora_r48_lr3e-4_seed0"]


def test_averages_are_estimated_to_take_longer() -> None:
    plan = plan_of(grid_of({"mode": "lora"}, {"mode": "lora", "laplace": LAPLACE}, {"mode": "lora", "ensemble": 2}))
    found = estimate_steps(plan, inputs_of(), 1e8)
    assert found.keys() == plan.steps.keys()
    one, two, ten = (found[f"evaluate-{stem}lora_r4_lr3e-4_seed0"].seconds for stem in ("", "ensemble-", "laplace-"))
    assert one < two < ten


@pytest.mark.parametrize(
    ("block", "changes", "message"),
    [
        ({"mode": "lora", "ensemble": 1}, {}, "ensemble must be at least 2 members, not 1"),
        ({"mode": "lora", "ensemble": 2, "laplace": {}}, {}, "set either ensemble or laplace, not both"),
        ({"mode": "pissa", "laplace": {}}, {}, "laplace needs a mode that trains A and B of each layer as they are"),
        ({"mode": "sharelora-ab", "laplace": {}}, {}, "laplace needs a mode that trains A and B of each layer as they are"),
        ({"mode": "lora", "laplace": {}, "load_in_4bit": True}, {}, "not mode lora on a base in 4 bits"),
        ({"mode": "lora", "laplace": {"limt": 3}}, {}, "laplace: unknown key 'limt' (did you mean limit?)"),
        ({"mode": "lora", "laplace": {"limit": 0}}, {}, "--limit must be at least 1, not 0"),
        ({"mode": "base", "ensemble": 2}, {}, "ensemble has no effect in mode base"),
        ({"mode": "lora", "ensemble": 2}, {"defaults": {"evaluate": False}}, "there are no predictions to average"),
        (
            {"mode": "lora", "ensemble": 2},
            {"defaults": {"evaluate": {"backend": "vllm"}}},
            "averages need backend transformers",
        ),
        ({"mode": "lora", "ensemble": 2, "seed": [0, 1000]}, {}, "must lie within 1000 of each other"),
        (
            {"mode": "lora", "ensemble": 3, "seed": 4294966000},
            {},
            "ensemble lora: the last of its 3 members would have the seed 4294968000, but seeds are below 2^32",
        ),
        (
            {"mode": "lora", "ensemble": 2, "learning_rate": [1e-3, 1e-2]},
            {"sweep": {"seeds": [1000]}, "confirm": {"seeds": [0, 1, 2]}},
            "must lie within 1000 of each other",
        ),
        ({"mode": "lora", "laplace": {}, "learning_rate": [1e-3, 1e-2]}, {}, "no validation loss to choose a learning rate by"),
        ({"mode": "lora", "laplace": {}, "start": "mean-delta"}, {}, "not one with start mean-delta"),
    ],
)
def test_what_cannot_be_averaged_is_refused(block: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        grid_of(block, **changes)
    assert message in str(error.value)


def test_two_trainings_under_one_name_are_refused() -> None:
    grid = grid_of({"mode": "lora"}, {"mode": "lora", "ensemble": 2, "max_steps": 7})
    with pytest.raises(
        UsageError, match=r"two rows would write runs/lora_r4_lr3e-4_seed0 with different settings \(max_steps\)"
    ):
        plan_of(grid)


def test_a_run_that_two_rows_of_a_sweep_share_goes_as_far_as_one_of_them_needs() -> None:
    grid = grid_of({"mode": "lora", "rank": 4}, defaults={"train": {"max_steps": 4, "validation_size": 6}, "evaluate": {}})
    early, late = (grid.rows[0].at(3e-4, 100, "sweep", stop) for stop in (2, 3))
    average = dataclasses.replace(late, name="laplace-" + late.run, laplace={})
    for rows in ((early, average), (average, early)):
        plan = plan_of(dataclasses.replace(grid, rows=rows))
        assert [step.stop_at for step in plan.steps.values() if step.kind == "train"] == [3]
        assert "--stop-at" in plan.steps[f"train-{early.run}"].argv


def test_a_changed_approximation_is_made_again(tmp_path: Path) -> None:
    plan = plan_of(grid_of({"mode": "lora", "laplace": {}}), tmp_path)

    def carry_out() -> list[str]:
        launcher = PretendLauncher()
        run_plan(plan, launcher)
        return [argv[0] for argv in launcher.submitted]

    assert carry_out() == ["train", "laplace", "evaluate"]
    assert carry_out() == []
    (tmp_path / "runs" / "laplace-lora_r4_lr3e-4_seed0" / "adapter" / "adapter_model.safetensors").write_text("changed")
    assert carry_out() == ["laplace", "evaluate"]
    assert all(done_steps(plan).values())


def _cora(*arguments: str) -> str:
    """What the command prints; it must succeed."""
    command = [sys.executable, "-P", "-m", "cora_cli", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.mark.slow
def test_a_grid_of_averages_runs_and_is_compared_with_plain_lora(tiny_model: Path, tmp_path: Path) -> None:
    lora = {"mode": "lora", "seed": [0, 1, 2]}
    values = {
        "model": str(tiny_model),
        "datasets": {"code": "builtin:code"},
        "defaults": {
            "train": {"rank": 4, "max_steps": 2, "batch_size": 4, "eval_limit": 4},
            "evaluate": {"metrics": ["calibration"], "limit": 4, "max_new_tokens": 1},
        },
        "grid": [lora, {**lora, "ensemble": 2}, {**lora, "laplace": {"limit": 2, "directions": 4}}],
    }
    (tmp_path / "grid.yaml").write_text(json.dumps(values))
    out = tmp_path / "out"
    _cora("ablate", str(tmp_path / "grid.yaml"), "-o", str(out))
    text = _cora("report", str(out))
    assert "ensemble lora r=4 compared with lora r=4 (LoRA at equal rank)" in text
    assert "laplace lora r=4 compared with lora r=4 (LoRA at equal rank)" in text
    rows = {row["label"]: row for row in read_json(out / "plan.json", dict[str, Any])["rows"]}
    assert [Path(place).name for place in rows["ensemble lora"]["members"]] == [f"lora_r4_lr3e-4_seed{n}" for n in (2, 1002)]
    # The parameters of both members count, and a Laplace approximation has no held-out loss of its own.
    found = {result.row.label: result for result in collect(read_plan(out)).results}
    assert found["ensemble lora"].trained == 2 * found["lora"].trained == 2 * found["laplace lora"].trained
    assert [LOSS in found[label].measures for label in ("lora", "ensemble lora", "laplace lora")] == [True, False, False]
    nll = [found[label].measures["nll"].value for label in ("lora", "ensemble lora", "laplace lora")]
    assert len(set(nll)) == 3
