import os
import shutil
import site
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import cora_cli
from cora_cli import writing
from cora_cli.errors import CoraError
from cora_cli.experiments.estimate import Estimate, steps_that_fit
from cora_cli.experiments.execute import Execution, Outcome, done_steps, log_of, refuse_other_grid, write_plan
from cora_cli.experiments.launch import Job, LocalLauncher
from cora_cli.experiments.plan_text import summary
from cora_cli.experiments.screen import Screen, duration
from cora_cli.experiments.steps import Plan
from cora_cli.lock import own_directory
from cora_cli.reading import read_json, read_jsonl
from tests.counting import assert_linear
from tests.experiments.helpers import FB, LORA, ROWS, PretendLauncher, carry_out, grid_of, plan_of

pytestmark = pytest.mark.usefixtures("quick")
STEPS = 7  # a fine-tune, a basis, two runs, three evaluations


def test_every_step_runs_once_and_after_its_dependencies(plan: Plan) -> None:
    outcome, started = carry_out(plan)
    assert len(outcome.completed) == len(started) == STEPS
    assert len(set(started)) == STEPS
    order = [started.index(name) for name in ("model-c", "basis", f"train-{FB}", f"evaluate-{FB}")]
    assert order == sorted(order)


def test_a_second_call_does_nothing(plan: Plan) -> None:
    carry_out(plan)
    outcome, started = carry_out(plan)
    assert (started, len(outcome.up_to_date)) == ([], STEPS)
    assert "steps are up to date" in summary(plan, outcome)


def test_what_steps_note_in_their_logs_is_shown_once(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    launcher = PretendLauncher()
    runs = [step for step in plan.steps.values() if step.kind == "train"]
    dropped = {step.argv: 3 + (step is runs[0]) for step in runs}

    def said(argv: Sequence[str]) -> str:
        of_run = f"note: {plan.out}/runs/{len(launcher.submitted)}: all answers were cut"
        return f"{of_run}\nnote: {dropped.get(tuple(argv), 3)} records were dropped\nnote: columns left out: b\nno note: c"

    launcher.said = said
    carry_out(plan, launcher)
    notes = [line for line in capsys.readouterr().err.splitlines() if "note" in line]
    assert sorted(notes) == [
        f"    note: {plan.out}/runs/1: all answers were cut",
        "    note: 3 records were dropped",
        "    note: 4 records were dropped",
        "    note: columns left out: b",
    ]


def test_what_steps_note_of_two_data_sets_is_shown_of_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = grid_of({"mode": "lora", "dataset": ["one", "two"]}, datasets={"one": "records", "two": "tasks"})
    plan = plan_of(grid, tmp_path / "out")
    launcher = PretendLauncher()
    launcher.said = lambda argv: "note: 2 training records dropped" if argv[0] == "train" else ""
    carry_out(plan, launcher)
    assert capsys.readouterr().err.count("note: 2 training records dropped") == 2


def test_what_a_step_noted_in_an_earlier_call_is_not_shown_again(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    launcher = PretendLauncher()
    launcher.said = lambda argv: "note: columns left out: b"
    carry_out(plan, launcher)
    for step in plan.steps.values():
        log = log_of(plan, step)
        log.write_text(f"{log.read_text()}$ cora {' '.join(step.argv)}\nnote: columns left out: c\n")
    for record in (plan.out / "steps").iterdir():
        record.unlink()
    capsys.readouterr()

    class Silent(PretendLauncher):
        def submit(self, kind: str, argv: Sequence[str], log: Path) -> Any:
            text = log.read_text()
            job = super().submit(kind, argv, log)
            log.write_text(text)
            return job

    carry_out(plan, Silent())
    assert [line for line in capsys.readouterr().err.splitlines() if "note" in line] == ["    note: columns left out: c"]


def test_only_what_the_chosen_rows_need_is_run(plan: Plan) -> None:
    assert carry_out(plan, rows=[LORA])[1] == [f"train-{LORA}", f"evaluate-{LORA}"]
    assert sorted(carry_out(plan)[1]) == sorted(["model-c", "basis", f"train-{FB}", f"evaluate-{FB}", "evaluate-base"])


@pytest.mark.parametrize("slots", [1, 3])
def test_as_many_steps_run_at_a_time_as_there_are_slots(plan: Plan, slots: int) -> None:
    launcher = PretendLauncher(slots)
    carry_out(plan, launcher)
    assert launcher.most == slots
    assert launcher.running == 0


def test_a_failure_stops_only_dependent_steps(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(argv: Sequence[str]) -> str | None:
        return "the disk is full" if argv[0] == "extract-basis" else None

    outcome, _ = carry_out(plan, PretendLauncher(fails=fails))
    (basis,) = outcome.failed
    assert outcome.failed[basis] == "the disk is full"
    assert outcome.blocked == {f"train-{FB}": basis, f"evaluate-{FB}": basis}
    assert len(outcome.completed) == STEPS - 3
    assert f"train-{FB}: skipped, because {basis} failed" in capsys.readouterr().err
    text = summary(plan, outcome)
    assert f"{basis} failed; last lines of {plan.out / 'logs' / basis}.log:" in text
    assert "    cora: error: the disk is full" in text
    # The next call runs the failed step and its dependents again.
    again, started = carry_out(plan)
    assert sorted(started) == sorted(["basis", f"train-{FB}", f"evaluate-{FB}"])
    assert not again.failed


def test_a_step_without_output_has_failed(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PretendLauncher, "_make", lambda self, argv: None)
    outcome, _ = carry_out(plan)
    assert "exited without an error, but wrote nothing to" in outcome.failed[f"train-{LORA}"]


def damage(plan: Plan, place: str, how: str) -> None:
    path = plan.out / place
    if how == "remove":
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        path.write_text(how)


@pytest.mark.parametrize(
    ("place", "how", "rerun"),
    [
        (f"runs/{LORA}/adapter/adapter_model.safetensors", "altered", [f"train-{LORA}"]),
        (f"runs/{LORA}/adapter", "remove", [f"train-{LORA}"]),
        (f"runs/{LORA}/run.json", '{"status": "fin', [f"train-{LORA}", f"evaluate-{LORA}"]),
        (f"runs/{LORA}/log.jsonl", "remove", [f"train-{LORA}", f"evaluate-{LORA}"]),
        (f"runs/{LORA}/test.jsonl", "altered", [f"train-{LORA}"]),
        (f"runs/{LORA}", "remove", [f"train-{LORA}", f"evaluate-{LORA}"]),
        (f"runs/{LORA}/evaluation/predictions.jsonl", "altered", [f"evaluate-{LORA}"]),
        (f"runs/{LORA}/evaluation/metrics.json", "remove", [f"evaluate-{LORA}"]),
        (f"steps/train-{LORA}.json", "no JSON", [f"train-{LORA}"]),
        (f"steps/train-{LORA}.json", "remove", [f"train-{LORA}"]),
    ],
)
def test_only_damaged_steps_run_again(plan: Plan, place: str, how: str, rerun: list[str]) -> None:
    carry_out(plan)
    damage(plan, place, how)
    outcome, started = carry_out(plan)
    assert (sorted(started), outcome.failed) == (sorted(rerun), {})
    assert carry_out(plan)[1] == []


@pytest.mark.parametrize("damage_of", ['{"settings": {"mo', '{"prompts_cut": 7}'])
def test_a_changed_description_of_answers_is_not_believed(
    damage_of: str, plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    carry_out(plan)
    place = f"runs/{LORA}/evaluation/generation.json"
    damage(plan, place, damage_of)
    launcher = PretendLauncher()
    found: list[bool] = []
    launcher._fails = lambda argv: found.append((plan.out / place).exists())
    assert carry_out(plan, launcher)[1] == [f"evaluate-{LORA}"]
    assert found == [False]
    assert f"{plan.out / place} was changed after it was written: answering again" in capsys.readouterr().err
    assert carry_out(plan)[1] == []


def test_a_damaged_basis_is_extracted_again_and_its_runs_are_kept_if_it_is_identical(plan: Plan) -> None:
    carry_out(plan)
    (basis,) = (plan.out / "bases").iterdir()
    basis.write_text("damaged")
    assert carry_out(plan)[1] == ["basis"]


def test_dependents_run_again_if_the_result_of_a_step_changes(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    carry_out(plan)
    (basis,) = (plan.out / "bases").iterdir()
    basis.write_text("damaged")
    other = PretendLauncher()
    other.content = "made by another processor"
    assert sorted(carry_out(plan, other)[1]) == sorted(["basis", f"train-{FB}", f"evaluate-{FB}"])
    # A run cannot be continued on another basis: its directory was cleared.
    assert f"{plan.out / 'runs' / FB} was created with other settings or inputs" in capsys.readouterr().err


def test_a_step_that_was_killed_is_continued(plan: Plan) -> None:
    carry_out(plan, rows=[LORA])
    record = plan.out / "steps" / f"train-{LORA}.json"
    writing.write_json(record, {**read_json(record), "status": "started"})
    kept = plan.out / "runs" / LORA / "checkpoints" / "step"
    writing.write_text(kept, "half of the way")
    assert f"train-{LORA}" in carry_out(plan, rows=[LORA])[1]
    assert kept.exists()


def test_done_steps_are_found_without_changing_anything(plan: Plan) -> None:
    assert not any(done_steps(plan).values())
    carry_out(plan)
    assert all(done_steps(plan).values())
    damage(plan, f"runs/{LORA}/log.jsonl", "altered")
    # The evaluation's own files are complete, but its inputs are not.
    assert {name for name, done in done_steps(plan).items() if not done} == {f"train-{LORA}", f"evaluate-{LORA}"}


def test_the_plan_its_grid_and_the_base_model_s_records_are_written(plan: Plan) -> None:
    write_plan(plan)
    assert [row["name"] for row in read_json(plan.out / "plan.json")["rows"]] == ["base", FB, LORA]
    assert read_jsonl(plan.out / "records" / "data.jsonl") == plan.records["records/data.jsonl"]
    assert "cora-fb" in (plan.out / "grid.yaml").read_text()


def test_an_interruption_stops_running_steps_and_keeps_finished_ones(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = PretendLauncher()

    def interrupt(*_: Any) -> None:
        if len(launcher.submitted) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Screen, "show", interrupt)
    with pytest.raises(KeyboardInterrupt):
        carry_out(plan, launcher)
    assert launcher.running == 0
    monkeypatch.undo()
    assert len(carry_out(plan)[1]) == STEPS - 3


def test_processes_get_a_gpu_each_or_share_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    gpus = LocalLauncher(None, "auto")
    assert gpus.slots == 2
    assert [gpus._environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["3", "5"]
    with pytest.raises(CoraError, match="at most 2 with 2 visible GPUs, not 3"):
        LocalLauncher(3, "auto")
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    threads = LocalLauncher(3, "cpu")
    assert threads._environment(0)["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "7,2")  # one number for each level of nesting
    assert LocalLauncher(3, "cpu")._environment(0)["OMP_NUM_THREADS"] == "2"
    assert LocalLauncher(None, "cpu").slots == 1


def test_packages_beside_an_installed_one_do_not_come_before_the_standard_library(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(Path(cora_cli.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "mine", ""]))
    monkeypatch.setattr(site, "getsitepackages", list)
    assert LocalLauncher(1, "cpu")._environment(0)["PYTHONPATH"].split(os.pathsep) == [folder, "mine"]
    monkeypatch.setattr(site, "getsitepackages", lambda: [folder])
    assert LocalLauncher(1, "cpu")._environment(0)["PYTHONPATH"] == "mine"


def test_several_processes_share_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    shared = LocalLauncher(None, "auto", per_gpu=2)
    assert shared.slots == 4
    assert [shared._environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(4)] == ["3", "5", "3", "5"]
    fewer = LocalLauncher(3, "auto", per_gpu=2)
    assert [fewer._environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(fewer.slots)] == ["3", "5", "3"]
    with pytest.raises(CoraError, match="at most 4 with 2 visible GPUs, not 5: 2 steps share each"):
        LocalLauncher(5, "auto", per_gpu=2)


def test_as_many_steps_share_a_gpu_as_half_of_its_memory_holds_of_the_largest() -> None:
    steps = [Estimate(1.0, 3e9), Estimate(1.0, 5e9)]
    assert [steps_that_fit(steps, gib) for gib in (4e9, 19e9, 20e9, 80e9)] == [1, 1, 2, 8]


@pytest.fixture(scope="module")
def started_among_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalLauncher]:
    """A launcher in a working directory with a module of the standard library's name; it imports the libraries once for its steps."""
    place = tmp_path_factory.mktemp("working")
    (place / "random.py").write_text("raise SystemExit('executed')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        yield LocalLauncher(1, "cpu")


def ended(job: Job) -> int:
    while (code := job.ended()) is None:
        time.sleep(0.05)
    return code


def test_a_process_is_logged_and_its_exit_code_returned(started_among_modules: LocalLauncher, tmp_path: Path) -> None:
    job = started_among_modules.submit("train", ["no-such-command"], tmp_path / "logs" / "step.log")
    assert ended(job) == 2
    text = (tmp_path / "logs" / "step.log").read_text()
    assert text.startswith("$ cora no-such-command\n")
    assert "there is no command" in text


def test_a_module_in_the_working_directory_is_not_executed(started_among_modules: LocalLauncher, tmp_path: Path) -> None:
    code = ended(started_among_modules.submit("train", ["--version"], tmp_path / "step.log"))
    assert code == 0, (tmp_path / "step.log").read_text()


@pytest.mark.parametrize(("seconds", "text"), [(41.4, "41 s"), (420, "7 min"), (12_600, "3.5 h"), (1_036_800, "12 days")])
def test_durations_are_round(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_run_is_kept_until_the_one_that_replaces_it_is_finished(plan: Plan) -> None:
    carry_out(plan)
    before = {path.name: path.read_bytes() for path in (plan.out / "runs" / LORA).iterdir() if path.is_file()}
    changed = plan_of(grid_of(*ROWS), plan.out, records="other")
    outcome, _ = carry_out(changed, PretendLauncher(fails=lambda argv: "no" if argv[0] == "train" else None))
    assert f"train-{LORA}" in outcome.failed
    aside = plan.out / "runs" / f".{LORA}.replaced"
    assert {name: (aside / name).read_bytes() for name in before} == before
    outcome, _ = carry_out(changed)
    assert not outcome.failed
    assert sorted(path.name for path in (plan.out / "runs").iterdir()) == sorted([FB, LORA])


def test_running_a_grid_costs_in_proportion_to_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # its calls count, not the disk's time

    def execution(rows: int, fails: bool) -> Callable[[], Outcome]:
        plan = plan_of(grid_of({"mode": ["fb", "lora"], "seed": list(range(rows // 2))}), tmp_path / f"{rows}-{fails}")
        launcher = PretendLauncher(4, fails=lambda argv: "no" if fails and argv[0] == "train" else None)
        expected = dict.fromkeys(plan.steps, 1.0)

        def work() -> Outcome:
            with own_directory(plan.out) as lock:
                screen = Screen(plan, set(plan.steps), launcher.slots, expected)
                return Execution(plan, set(plan.steps), launcher, screen, lock).run()

        return work

    assert_linear(lambda rows: execution(rows, fails=False))
    assert_linear(lambda rows: execution(rows, fails=True))


def test_the_time_left_counts_waiting_and_running_steps(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("cora_cli.experiments.screen.time.monotonic", lambda: now[0])
    screen = Screen(plan, set(plan.steps), 1, dict.fromkeys(plan.steps, 10.0))
    steps = list(plan.steps.values())
    screen.submitted(steps[0], "started")
    assert "about 70 s left" in capsys.readouterr().err
    now[0] = 4.0
    screen.submitted(steps[1], "started")
    assert "about 66 s left" in capsys.readouterr().err
    train = [step for step in steps if step.kind == "train"]
    screen.submitted(train[0], "started")
    screen.completed(train[0], 30.0, Path("no log"))  # what is measured replaces the estimate of its kind
    screen.up_to_date(steps[1])
    screen.submitted(train[1], "started")
    # 6 s of the first step, 30 s of the other training, and 10 s of each of the other three.
    assert "about 66 s left" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"files": {}}, {"facts": {}}, {"result": "0" * 64}, {"seconds": 5.0}])
def test_a_record_that_was_changed_after_it_was_written_is_not_believed(change: dict[str, Any], plan: Plan) -> None:
    carry_out(plan)
    path = plan.out / "steps" / f"train-{LORA}.json"
    writing.write_json(path, read_json(path) | change)
    assert not done_steps(plan)[f"train-{LORA}"]
    assert carry_out(plan)[1] == [f"train-{LORA}"]
    assert all(done_steps(plan).values())


def test_a_link_in_the_place_of_a_run_fails_that_run_by_name_and_is_not_followed(plan: Plan, tmp_path: Path) -> None:
    carry_out(plan, rows=[LORA])
    place = plan.out / "runs" / LORA
    place.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "run.json").write_text("{}")
    place.symlink_to(tmp_path / "elsewhere")
    outcome, _ = carry_out(plan, rows=[LORA])
    assert f"{place} is a symbolic link to" in outcome.failed[f"train-{LORA}"]
    assert (tmp_path / "elsewhere" / "log.jsonl").exists()


def test_a_grid_file_in_the_output_directory_is_not_replaced_by_the_resolved_grid(plan: Plan) -> None:
    refuse_other_grid(plan.out)
    write_plan(plan)
    refuse_other_grid(plan.out)
    (plan.out / "plan.json").unlink()
    with pytest.raises(CoraError, match=r"grid.yaml would be replaced by the resolved grid.*--output-dir, or rename the file"):
        refuse_other_grid(plan.out)
