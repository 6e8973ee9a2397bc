"""Grids that sweep and then confirm: what runs, in which order, and how often; after a kill, too."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from cora_cli import writing
from cora_cli.errors import CoraError, UsageError
from cora_cli.experiments.ablate import Request, ablate, run_stages
from cora_cli.experiments.estimate import Estimate
from cora_cli.experiments.stage_work import stage_lines
from cora_cli.experiments.stages import Stages
from cora_cli.experiments.steps import StepFlags
from cora_cli.lock import own_directory
from cora_cli.reading import read_json
from cora_cli.records import read_sealed

from .helpers import (
    CONFIRM,
    RATES,
    SWEEP,
    TRAIN,
    Loss,
    SweepLauncher,
    inputs_of,
    run_staged,
    staged_grid,
    value_of,
)

pytestmark = pytest.mark.usefixtures("quick")


def distance(mode: str, rate: float, step: int) -> float:
    """3e-3 is best, and no rate is within the slack of it."""
    return 1 + abs(RATES.index(rate) - 1) / 2 - step / 100 if rate in RATES else 9.0


def test_losers_stop_early_and_the_winner_is_confirmed_with_fresh_seeds(tmp_path: Path) -> None:
    launcher = SweepLauncher(distance)
    outcome = run_staged(staged_grid({"mode": "lora", "learning_rate": RATES}), tmp_path, launcher, lambda: {})
    assert launcher.trained() == [
        ("lora", "0.001", "100", "2"),
        ("lora", "0.003", "100", "2"),
        ("lora", "0.01", "100", "2"),
        ("lora", "0.001", "100", "4"),
        ("lora", "0.003", "100", "4"),
        *(("lora", "0.003", str(seed), "end") for seed in range(5)),
    ]
    assert not outcome.failed
    trainings = [argv for argv in launcher.submitted if argv[0] == "train"]
    assert ["--no-validation-loss" in argv for argv in trainings] == [False] * 5 + [True] * 5
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["looks"] == 3
    assert plan["sweeps"] == [
        {
            "method": ["data", "lora", None, "lora", 4, None],
            "planned": RATES,
            "losses": {"0.001": {"2": 1.48, "4": 1.46}, "0.003": {"2": 0.98, "4": 0.96}, "0.01": {"2": 1.48}},
            "dropped": {"0.01": 2, "0.001": 4},
            "chosen": 3e-3,
            "added": None,
        }
    ]
    stages = [(row["stage"], row["seed"]) for row in plan["rows"]]
    assert stages == [("sweep", 100)] * 3 + [("confirm", seed) for seed in range(5)]


def test_a_second_call_has_nothing_to_do(tmp_path: Path) -> None:
    run_staged(staged_grid(), tmp_path, SweepLauncher(distance))
    again = SweepLauncher(distance)
    run_staged(staged_grid(), tmp_path, again)
    assert again.submitted == []


def test_only_undecided_methods_get_another_seed(tmp_path: Path) -> None:
    launcher = SweepLauncher(distance)
    lora, dora = ("data", "lora", None, "lora", 4, None), ("data", "dora", None, "dora", 4, None)
    answers = iter([{lora: 4, dora: 3}, {lora: 5, dora: 3}, {lora: 5, dora: 3}])
    run_staged(staged_grid(), tmp_path, launcher, lambda: next(answers))
    confirmed = [(mode, seed) for mode, _, seed, stop in launcher.trained() if stop == "end"]
    assert [seed for mode, seed in confirmed if mode == "lora"] == ["0", "1", "2", "3", "4"]
    assert [seed for mode, seed in confirmed if mode == "dora"] == ["0", "1", "2"]


@pytest.mark.parametrize("after", [11, *(pytest.param(place, marks=pytest.mark.slow) for place in (1, 3, 5, 7, 9, 13, 15))])
def test_a_grid_that_is_cut_off_goes_on_where_it_was(after: int, tmp_path: Path) -> None:
    uncut = SweepLauncher(distance)
    run_staged(staged_grid(), tmp_path / "uncut", uncut)

    class CutOff(SweepLauncher):
        def submit(self, kind: str, argv: Sequence[str], log: Path) -> Any:
            if len(self.submitted) == after:
                raise KeyboardInterrupt
            return super().submit(kind, argv, log)

    first, second = CutOff(distance), SweepLauncher(distance)
    with pytest.raises(KeyboardInterrupt):
        run_staged(staged_grid(), tmp_path / "cut", first)
    run_staged(staged_grid(), tmp_path / "cut", second)
    done = [*first.trained(), *second.trained()]
    assert sorted(set(done)) == sorted(uncut.trained())
    assert len(done) - len(set(done)) <= 1, "only the step in flight runs again"
    cut, complete = (json.dumps(read_sealed(tmp_path / name / "plan.json")) for name in ("cut", "uncut"))
    assert cut == complete.replace(str(tmp_path / "uncut"), str(tmp_path / "cut"))


def test_a_rate_at_the_edge_adds_one_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launcher = SweepLauncher(lambda mode, rate, step: 1 / rate)
    run_staged(staged_grid({"mode": "lora", "learning_rate": RATES}), tmp_path, launcher)
    assert ("lora", "0.0333", "100", "4") in launcher.trained()
    assert {rate for _, rate, _, stop in launcher.trained() if stop == "end"} == {"0.0333"}
    said = capsys.readouterr().err
    assert "lora: the best learning rate is the highest of its sweep, so 0.0333 is tried as well" in said
    assert "lora: learning rate 0.0333 chosen, still at the edge of its sweep" in said


def test_training_that_diverges_loses_the_sweep_and_does_not_fail_the_grid(tmp_path: Path) -> None:
    class Diverging(SweepLauncher):
        def submit(self, kind: str, argv: Sequence[str], log: Path) -> Any:
            job = super().submit(kind, argv, log)
            if value_of(argv, "--learning-rate") == "0.01":
                writing.write_json(
                    Path(value_of(argv, "--output-dir")) / "run.json",
                    {"status": "failed", "diverged": True, "error": "the loss is nan"},
                )
            return job

    launcher = Diverging(
        distance, fails=lambda argv: "the loss is nan" if value_of(argv, "--learning-rate") == "0.01" else None
    )
    outcome = run_staged(staged_grid({"mode": "lora", "learning_rate": RATES}), tmp_path, launcher)
    assert outcome.failed == {}
    assert json.loads((tmp_path / "plan.json").read_text())["sweeps"][0]["losses"]["0.01"] == {"2": None}
    again = Diverging(distance)
    run_staged(staged_grid({"mode": "lora", "learning_rate": RATES}), tmp_path, again)
    assert again.submitted == []


def test_a_sweep_that_fails_ends_the_call_and_is_tried_again_by_the_next(tmp_path: Path) -> None:
    def no_disk(argv: Sequence[str]) -> str | None:
        return "the disk is full" if value_of(argv, "--mode") == "dora" else None

    outcome = run_staged(staged_grid(), tmp_path, SweepLauncher(distance, fails=no_disk))
    assert sorted(outcome.failed) == [f"train-dora_r4_lr{rate}_seed100" for rate in ("0.01", "1e-3", "3e-3")]
    launcher = SweepLauncher(distance)
    assert not run_staged(staged_grid(), tmp_path, launcher).failed
    assert ("dora", "0.001", "100", "2") in launcher.trained()
    assert ("lora", "0.001", "100", "2") not in launcher.trained()


def test_a_changed_loss_file_is_measured_again(tmp_path: Path) -> None:
    run_staged(staged_grid({"mode": "lora", "learning_rate": RATES}), tmp_path, SweepLauncher(distance))
    path = tmp_path / "runs" / "lora_r4_lr0.01_seed100" / "stops" / "2.json"
    path.write_text(path.read_text().replace("1.48", "0.10"))
    again = SweepLauncher(distance)
    run_staged(staged_grid({"mode": "lora", "learning_rate": RATES}), tmp_path, again)
    assert again.trained() == [("lora", "0.01", "100", "2")]
    assert json.loads(path.read_text())["validation"]["loss"] == 1.48


@pytest.mark.parametrize("damage", ["an earlier loss", pytest.param("the directory", marks=pytest.mark.slow)])
def test_a_rate_that_lost_what_it_was_measured_by_is_measured_again_at_every_rung(damage: str, tmp_path: Path) -> None:
    grid = staged_grid({"mode": "lora", "learning_rate": RATES})
    run_staged(grid, tmp_path, SweepLauncher(distance))
    before = read_json(tmp_path / "plan.json")
    (stopped_twice, *_) = [
        path for path in sorted((tmp_path / "runs").glob("*_seed100")) if (path / "stops" / "4.json").exists()
    ]
    if damage == "the directory":
        shutil.rmtree(stopped_twice)
    else:
        with (stopped_twice / "stops" / "2.json").open("a") as file:
            file.write(" ")
    again = SweepLauncher(distance)
    run_staged(grid, tmp_path, again)
    assert [stop for *_, stop in again.trained()] == ["2", "4"]
    after = read_json(tmp_path / "plan.json")
    assert (after["sweeps"], len(after["rows"])) == (before["sweeps"], len(before["rows"]))
    assert after["sweeps"][0]["chosen"] is not None


class LosingLauncher(SweepLauncher):
    """After every second rung, the loss at the first one is gone."""

    def _make(self, argv: Sequence[str]) -> None:
        super()._make(argv)
        if value_of(argv, "--stop-at", "8") == "4":
            (Path(value_of(argv, "--output-dir")) / "stops" / "2.json").unlink(missing_ok=True)


def test_a_sweep_that_cannot_be_completed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        CoraError, match=r"the sweep of lora has no loss at step 2 for the learning rate .*run the same command again"
    ):
        run_staged(staged_grid({"mode": "lora", "learning_rate": RATES}), tmp_path, LosingLauncher(distance))


def test_a_rung_beyond_the_end_of_any_row_is_refused() -> None:
    short = {"mode": "dora", "learning_rate": RATES, "max_steps": 3}
    with pytest.raises(CoraError, match="the rung at step 4 is beyond the 3 steps of the row dora"):
        staged_grid({"mode": "lora", "learning_rate": RATES}, short)


def test_the_dry_run_counts_the_most_and_the_likely_runs() -> None:
    grid = staged_grid()
    stages = Stages(grid, Path("out"), inputs_of(), StepFlags("cpu", "fp32"))
    plan = stages.plan([row for row in grid.rows if row.train is None] + [method.rows[0] for method in stages.methods()])
    rungs, confirming, work = stage_lines(grid, stages.methods(), plan, {})
    assert rungs == (
        "sweep: at step 2 the worse half of the learning rates is dropped, down to 2, and the best one is chosen at step 4 of 8 (seeds 100)"
    )
    assert confirming.startswith("confirm: 3 to 5 seeds of each method (0, 1, 2, 3, 4)")
    assert work.startswith("at most 18 training runs, unknown time; likely 14, unknown time")


def test_the_dry_run_counts_every_member_of_an_ensemble() -> None:
    block = {"mode": "lora", "learning_rate": RATES, "ensemble": 4}
    grid = staged_grid(block, defaults={"train": TRAIN, "evaluate": {"metrics": ["calibration"]}})
    stages = Stages(grid, Path("out"), inputs_of(), StepFlags("cpu", "fp32"))
    methods = stages.methods()
    plan = stages.plan([method.rows[0] for method in methods])
    estimates = {name: Estimate(10.0 if step.kind == "train" else 8.0, 0) for name, step in plan.steps.items()}
    [*_, work] = stage_lines(grid, methods, plan, estimates)
    assert work.startswith("at most 24 training runs, about 4 min; likely 19, about 3 min")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"confirm": None}, "sweep needs a section confirm"),
        ({"sweep": {"seeds": []}}, r"sweep: seeds must be one or two integers, not \[\]"),
        ({"sweep": {"seeds": ["a"]}}, r"sweep: seeds must be one or two integers, not \['a'\]"),
        (
            {"sweep": {"seeds": [100], "rungs": [4, 2]}},
            r"sweep: rungs must be steps in rising order, each at least 1, not \[4, 2\]",
        ),
        ({"sweep": {"seeds": [100], "rungs": [4, 20]}}, "sweep: the rung at step 20 is beyond the 8 steps of the row lora"),
        ({"sweep": {"seeds": [100], "slack": 2}}, "sweep: slack must be at least 0 and below 1, not 2"),
        ({"sweep": {"seeds": [100], "rung": [4]}}, "sweep: unknown key 'rung'"),
        ({"sweep": 3}, "sweep must hold `name: value` lines, not 3"),
        ({"sweep": {"seeds": [1]}}, "confirm: its seeds must be fresh, but seed 1 is also in sweep"),
        ({"confirm": {"seeds": [0, 1]}}, r"confirm: seeds must be at least 3 integers, not \[0, 1\]"),
        ({"confirm": {"seeds": [0, 1, 1]}}, r"confirm: seeds must be different integers of at least 0, not \[0, 1, 1\]"),
        ({"confirm": {"seeds": [0, 1, 2], "measures": ["rouge"]}}, "confirm: measures must be among heldout_loss, rouge1"),
        ({"confirm": {"seeds": [0, 1, 2], "measures": ["rouge1"]}}, "confirm: rouge1 is not measured, since evaluate is false"),
        ({"sweep": None}, "lora has several learning rates; add a section sweep, or choose one"),
        ({"defaults": {"train": {"max_steps": 8}, "evaluate": False}}, "sweep needs validation_size in defaults: train"),
        ({"defaults": {"train": {"validation_size": 6}, "evaluate": False}}, "sweep needs max_steps, which the row lora"),
        ({"defaults": {"train": {**TRAIN, "seed": 3}, "evaluate": False}}, "leave seed out of the grid's blocks"),
    ],
)
def test_sections_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        staged_grid(**changes)


def test_a_block_with_seeds_is_refused() -> None:
    with pytest.raises(UsageError, match="leave seed out of the grid's blocks"):
        staged_grid({"mode": "lora", "learning_rate": RATES, "seed": [0, 1]})


def test_rows_of_such_a_grid_cannot_be_picked(tmp_path: Path) -> None:
    request = Request(Path("tiny.yaml"), only="lora*")
    with (
        own_directory(tmp_path) as held,
        pytest.raises(UsageError, match="--only does not apply to a grid with sweep or confirm"),
    ):
        run_stages(request, staged_grid(), tmp_path, inputs_of(), SweepLauncher(distance), held, lambda place, measures: {})


@pytest.mark.parametrize("sweeps", [True, False])
def test_only_methods_that_never_trained_are_to_be_checked(sweeps: bool, tmp_path: Path) -> None:
    def untried(*modes: str) -> set[str]:
        grid = staged_grid(
            {"mode": [*modes], "learning_rate": RATES if sweeps else RATES[1]}, **({} if sweeps else {"sweep": None})
        )
        rows = Stages(grid, tmp_path, inputs_of(), StepFlags("cpu", "fp32")).untried()
        return {row.mode for row in rows}

    def fails(argv: Sequence[str]) -> str | None:
        return "no memory" if value_of(argv, "--mode") == "vera" else None

    assert untried("lora", "dora", "vera") == {"lora", "dora", "vera"}
    grid = staged_grid(
        {"mode": ["lora", "vera"], "learning_rate": RATES if sweeps else RATES[1]}, **({} if sweeps else {"sweep": None})
    )
    assert run_staged(grid, tmp_path, SweepLauncher(distance, fails=fails)).failed
    assert untried("lora", "dora", "vera") == {"dora", "vera"}
    changed = Stages(grid, tmp_path, inputs_of(base="another hash"), StepFlags("cpu", "fp32"))
    assert {row.mode for row in changed.untried()} == {"lora", "vera"}


def test_a_finished_grid_needs_no_rate_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_staged(staged_grid(), tmp_path, SweepLauncher(distance))
    monkeypatch.setattr("cora_cli.experiments.ablate.rate_of_steps", lambda *_: pytest.fail("nothing is left to estimate"))
    assert run_staged(staged_grid(), tmp_path, SweepLauncher(distance)).completed == ()


def test_a_repeated_call_checks_no_training_again(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[int] = []
    monkeypatch.setattr("cora_cli.experiments.ablate.check_trainings", lambda trainings, *_: checked.append(len(trainings)))
    monkeypatch.setattr("cora_cli.experiments.ablate._launcher", lambda *_: SweepLauncher(distance))
    values = {
        **{"model": str(tiny_model), "datasets": {"data": str(tiny_data)}, "sweep": SWEEP, "confirm": CONFIRM},
        **{"defaults": {"train": TRAIN, "evaluate": False}, "grid": [{"mode": ["lora", "dora"], "learning_rate": RATES}]},
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(values))
    request = Request(tmp_path / "grid.yaml", tmp_path / "out", device="cpu", dtype="fp32")
    for _ in range(2):
        ablate(request, lambda *_: {})
    assert checked == [2, 0]


def test_a_step_that_failed_once_and_was_completed_in_a_later_round_has_not_failed(tmp_path: Path) -> None:
    failures = iter(["no memory"])

    def fails(argv: Sequence[str]) -> str | None:
        first = value_of(argv, "--mode") == "dora" and value_of(argv, "--stop-at") == "2"
        return next(failures, None) if first else None

    outcome = run_staged(staged_grid(), tmp_path, SweepLauncher(distance, fails=fails))
    assert (outcome.failed, outcome.blocked) == ({}, {})
    assert next(failures, None) is None, "it did fail"


class ForwardLauncher(SweepLauncher):
    """Its runs have checkpoints, and like those of `cora train` they do not go back."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(loss, fails=self._refusal)

    def _refusal(self, argv: Sequence[str]) -> str | None:
        place, stop = Path(value_of(argv, "--output-dir")), value_of(argv, "--stop-at")
        passed = [int(path.name.removeprefix("checkpoint-")) for path in place.glob("checkpoints/*")]
        return "cannot stop at a step that it has passed" if stop and any(step > int(stop) for step in passed) else None

    def _make(self, argv: Sequence[str]) -> None:
        super()._make(argv)
        step = value_of(argv, "--stop-at", "8")
        (Path(value_of(argv, "--output-dir")) / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize("rungs", [[1, 2, 4], pytest.param([2, 3], marks=pytest.mark.slow)])
def test_a_run_that_has_passed_a_rung_that_came_later_is_trained_again(rungs: list[int], tmp_path: Path) -> None:
    rows = {"mode": "lora", "learning_rate": RATES}
    run_staged(staged_grid(rows), tmp_path / "edited", ForwardLauncher(distance))
    edited = staged_grid(rows, sweep={**SWEEP, "rungs": rungs})
    assert run_staged(edited, tmp_path / "edited", ForwardLauncher(distance)).failed == {}
    run_staged(edited, tmp_path / "fresh", ForwardLauncher(distance))
    after, fresh = (read_json(tmp_path / name / "plan.json")["sweeps"] for name in ("edited", "fresh"))
    assert after == fresh


def test_a_swept_run_with_a_changed_log_stops_at_every_rung_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cora_cli.experiments.ledger.FinishedRun", dict[str, Any])  # a pretended run records little
    grid = staged_grid({"mode": "lora", "learning_rate": RATES}, sweep={"seeds": [100], "rungs": [2, 8]})
    run_staged(grid, tmp_path, ForwardLauncher(distance))
    before = read_json(tmp_path / "plan.json")
    (tmp_path / "runs" / "lora_r4_lr3e-3_seed100" / "log.jsonl").write_text("another")
    again = ForwardLauncher(distance)
    assert run_staged(grid, tmp_path, again).failed == {}
    assert [stop for *_, stop in again.trained()] == ["2", "end"]
    assert read_json(tmp_path / "plan.json")["sweeps"] == before["sweeps"]
