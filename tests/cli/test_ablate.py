"""`cora ablate` on a tiny grid: killed in the middle and completed; the dry run; and errors."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cora_cli.cli import app
from cora_cli.evaluation.execution import sandbox
from cora_cli.experiments.execute import Outcome
from cora_cli.experiments.launch import LocalLauncher
from cora_cli.reading import read_json, read_jsonl

FB, LORA = "cora-fb_r4_n1_lr1e-3_seed0", "lora_r4_lr1e-3_seed0"
ROOT = Path(__file__).parents[2]


def write_grid(directory: Path, base: Path, data: Path, **changes: Any) -> Path:
    values = {
        "name": "tiny",
        "title": "A tiny grid",
        "model": str(base),
        "models": {"itself": str(base)},
        "datasets": {"counting": str(data)},
        "defaults": {
            "train": {"rank": 4, "learning_rate": 1e-3, "max_steps": 3, "batch_size": 2, "test_size": 4, "save_steps": 1},
            "evaluate": {"limit": 2, "max_new_tokens": 4, "metrics": ["rouge"]},
        },
        "grid": [{"mode": ["fb", "lora"]}, {"mode": "base"}],
    }
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return path


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["ablate", *map(str, arguments)])


@dataclasses.dataclass(frozen=True)
class Killed:
    """A grid that was killed with all its processes, the files on disk at that time, and its completion by a second call."""

    grid: Path
    out: Path
    before: dict[str, int]
    second: subprocess.CompletedProcess[str]


def command(grid: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "cora_cli", "ablate", str(grid), "--output-dir", str(out), "--device", "cpu"]


def times(out: Path) -> dict[str, int]:
    """When every file of the results was last written."""
    places = ("runs", "bases", "evaluations", "steps")
    return {
        str(path.relative_to(out)): path.stat().st_mtime_ns
        for place in places
        for path in (out / place).rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def killed(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    root = tmp_path_factory.mktemp("ablate")
    grid, out = write_grid(root, tiny_model, tiny_data), root / "out"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command(grid, out), cwd=ROOT, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    evaluation = out / "runs" / FB / "evaluation"
    while first.poll() is None and not evaluation.exists():
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    before = times(out)
    second = subprocess.run(command(grid, out), cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return Killed(grid, out, before, second)


@pytest.mark.slow
def test_a_killed_grid_is_completed_and_loses_only_the_step_in_flight(killed: Killed) -> None:
    assert killed.second.returncode == 0, killed.second.stderr
    assert "4 steps completed, 2 already up to date" in killed.second.stderr
    after = times(killed.out)
    kept = [
        name
        for name in killed.before
        if name.startswith("bases/") or (name.startswith(f"runs/{FB}/") and "/evaluation/" not in name)
    ]
    assert len(kept) > 5
    assert {name: killed.before[name] for name in kept} == {name: after[name] for name in kept}


@pytest.mark.slow
def test_every_row_ends_with_a_run_and_an_evaluation(killed: Killed) -> None:
    plan = read_json(killed.out / "plan.json")
    assert [row["name"] for row in plan["rows"]] == [FB, LORA, "base"]
    references = set()
    for row in plan["rows"]:
        place = killed.out / row["evaluation"]
        assert read_json(place / "metrics.json")["metrics"]["rouge1"]["n"] == 2
        references.add(tuple(line["reference"] for line in read_jsonl(place / "predictions.jsonl")))
        if row["run"]:
            assert read_json(killed.out / row["run"] / "run.json")["status"] == "finished"
    assert len(references) == 1
    basis = read_json(killed.out / plan["rows"][0]["run"] / "run.json")["basis"]
    assert Path(basis["path"]) == (killed.out / plan["rows"][0]["basis"]).resolve()
    assert (killed.out / "logs" / f"train-{LORA}.log").exists()
    assert f"evaluate-{LORA}: done in" in killed.second.stderr
    assert "rouge1" in killed.second.stderr


@pytest.mark.slow
def test_a_third_call_does_nothing(killed: Killed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalLauncher, "submit", lambda *_: pytest.fail("finished work was done again"))
    before = times(killed.out)
    result = run(killed.grid, "--output-dir", killed.out, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert "steps are up to date" in result.stderr
    assert times(killed.out) == before


@pytest.mark.slow
def test_a_dry_run_shows_what_is_done_and_writes_nothing(killed: Killed) -> None:
    before = times(killed.out)
    result = run(killed.grid, "--output-dir", killed.out, "--device", "cpu", "--dry-run")
    assert result.exit_code == 0, result.stderr
    rows, _ = result.stdout[result.stdout.index("| row") :].split("\n\n", 1)  # another table follows
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows.splitlines()]
    assert [(row[0], row[2], row[5]) for row in cells[2:]] == [
        (FB, f"{4 * 6 * 64:,}", "done"),
        (LORA, f"{4 * (6 * 64 + 2 * 128):,}", "done"),
        ("base", "0", "done"),
    ]
    assert "2 training runs" in result.stdout
    assert times(killed.out) == before


@pytest.mark.slow
def test_a_changed_grid_is_refused_before_anything_runs(
    killed: Killed, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    grid = write_grid(tmp_path, tiny_model, tiny_data, grid=[{"mode": "lora", "batch_size": 4}])
    result = run(grid, "--output-dir", killed.out, "--device", "cpu")
    assert result.exit_code == 1
    assert f"runs/{LORA} (batch_size); choose another --output-dir, or replace them with --overwrite" in result.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "./nowhere"}, "model './nowhere' is neither a directory on this disk nor a hub id"),
        (
            {"models": {"itself": "no-org/no-model"}},
            "model 'no-org/no-model' is not a local directory and could not be downloaded",
        ),
        ({"datasets": {"counting": "missing.jsonl"}}, "missing.jsonl"),
        ({"grid": [{"mode": "fb", "rank": 40}]}, "rank 40 exceeds the 32 rows of"),
        ({"grid": [{"mode": "fb", "share": "global"}]}, "share global needs weights with equal out-dimensions"),
    ],
)
def test_invalid_requests_are_refused_before_anything_runs(
    changes: dict[str, Any], message: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    result = run(write_grid(tmp_path, tiny_model, tiny_data, **changes), "--output-dir", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 1
    assert message in result.stderr
    assert not (tmp_path / "out" / "runs").exists()


def test_a_dry_run_lists_unresolved_inputs_and_does_not_fail(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    result = run(
        write_grid(tmp_path, tiny_model, tiny_data, model="no-org/no-model"), "--dry-run", "--output-dir", tmp_path / "out"
    )
    assert result.exit_code == 0, result.stderr
    assert "unresolved: no-org/no-model (" in result.stdout
    assert "unknown" in result.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jobs", "0"], "--jobs must be at least 1, not 0"),
        (["--device", "tpu"], "--device must be one of auto, cpu, cuda, not 'tpu'"),
        (["--only", "nothing*"], "--only 'nothing*' matches none of the 3 rows"),
        (
            ["--write-config", "mine.yaml"],
            "--output-dir has no effect with --write-config, which writes the grid file as it is",
        ),
        (["--measure", "few"], "--measure must be a number or all, not 'few'"),
        (["--list"], "--output-dir has no effect with --list, which lists the grids; leave it out"),
    ],
)
def test_usage_errors_end_with_code_2(
    arguments: list[str], message: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    result = run(write_grid(tmp_path, tiny_model, tiny_data), "--output-dir", tmp_path / "out", "--dry-run", *arguments)
    assert (result.exit_code, message in result.stderr) == (2, True)


def test_measuring_is_for_plans(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    result = run(write_grid(tmp_path, tiny_model, tiny_data), "--output-dir", tmp_path / "out", "--measure", "all")
    assert (result.exit_code, "--measure has no effect without --dry-run; leave it out" in result.stderr) == (2, True)


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_results_next_to_a_grid_file_named_as_the_resolved_one_are_refused(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    grid = write_grid(tmp_path, tiny_model, tiny_data).rename(tmp_path / "grid.yaml")
    before = grid.read_bytes()
    result = run(grid, "-o", tmp_path, "--device=cpu", *more)
    assert (result.exit_code, grid.read_bytes()) == (1, before)
    assert "grid.yaml would be replaced by the resolved grid" in result.stderr


def test_an_invalid_grid_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text("model: m\ngrid: [{mode: lroa}]\n")
    result = run(tmp_path / "grid.yaml")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1


def test_without_a_sandbox_a_grid_whose_answers_are_executed_trains_nothing(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox.require_sandbox.cache_clear()
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    train = {"rank": 4, "max_steps": 3, "batch_size": 2, "test_size": 4}
    executed = {"limit": 2, "max_new_tokens": 4, "metrics": ["pass@1"], "execute_code": True}
    grid = write_grid(tmp_path, tiny_model, tiny_data, defaults={"train": train, "evaluate": executed})
    result = run(grid, "--output-dir", tmp_path / "out", "--device", "cpu")
    sandbox.require_sandbox.cache_clear()
    assert (result.exit_code, "bwrap is not installed" in result.stderr) == (1, True)
    assert not [*(tmp_path / "out").rglob("run.json")]


@pytest.mark.parametrize("number", ["2", "auto"])
def test_steps_that_should_share_a_gpu_are_refused_where_there_is_none(
    number: str, tmp_path: Path, tiny_model: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    ended = run(write_grid(tmp_path, tiny_model, tiny_data), "-o", tmp_path / "out", "--jobs-per-gpu", number)
    assert ended.exit_code == 1
    assert f"--jobs-per-gpu {number} needs a GPU, and none is visible; use --jobs" in ended.stderr


def test_auto_lets_as_many_steps_share_a_gpu_as_fit(
    tmp_path: Path, tiny_model: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr("cora_cli.experiments.ablate.free_gpu_bytes", lambda: 7e9)
    slots: list[int] = []
    monkeypatch.setattr("cora_cli.experiments.ablate.Screen", lambda plan, wanted, number, *_: slots.append(number))
    monkeypatch.setattr("cora_cli.experiments.ablate.Execution.run", lambda execution: Outcome((), (), {}, {}))
    ended = run(write_grid(tmp_path, tiny_model, tiny_data), "-o", tmp_path / "out", "--jobs-per-gpu", "auto")
    assert ended.exit_code == 0, ended.output
    assert (
        "--jobs-per-gpu auto: 4, since the largest step needs about 0.7 GiB and each GPU has at least 6.5 GiB free"
        in ended.stderr
    )
    assert slots == [8]
