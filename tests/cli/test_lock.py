"""Two commands at once on one output: the second of each kind is refused by the holder's process and changes nothing."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cora_cli.cli import app
from cora_cli.lock import own_directory, own_output
from tests.evaluation.helpers import unsealed
from tests.training.helpers import config_for, losses

ROOT = Path(__file__).parents[2]
ON_CPU = ["--device", "cpu", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def run(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    from cora_cli.training.run import train

    out = tmp_path_factory.mktemp("runs") / "run"
    train(config_for(tiny_model, tiny_data, out, max_steps=1))
    return out


@pytest.fixture
def arguments(run: Path, tiny_model: Path, tiny_basis: Path, tiny_data: Path, tmp_path: Path) -> dict[str, list[str]]:
    """Arguments of every command that writes, without its output, by a name that begins with the command's."""
    grid = {
        "name": "tiny",
        "model": str(tiny_model),
        "datasets": {"d": str(tiny_data)},
        "defaults": {"evaluate": False},
        "grid": [{"mode": "lora"}],
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    words = {
        "train": ["--mode", "lora", "--model", tiny_model, "--dataset", tiny_data, *ON_CPU],
        "train --resume": ["--mode", "lora", "--model", tiny_model, "--dataset", tiny_data, "--resume", *ON_CPU],
        "evaluate": [run, *ON_CPU],
        "evaluate --from": ["--from", tiny_data, "--device", "cpu"],
        "inspect": [tiny_basis, tiny_model, "--device", "cpu"],
        "report": [run],
        "ablate": [tmp_path / "grid.yaml", "--device", "cpu"],
        "demo": ["--device", "cpu"],
        "merge": [run],
        "export": [run],
        "extract-basis": [tiny_model, "--rank", "4", "--device", "cpu"],
    }
    return {name: list(map(str, each)) for name, each in words.items()}


def cora(*words: Any) -> Any:
    return CliRunner().invoke(app, list(map(str, words)))


@pytest.mark.parametrize(
    "name", ["train", "train --resume", "evaluate", "evaluate --from", "inspect", "report", "ablate", "demo"]
)
def test_a_directory_at_work_refuses_the_second_command(name: str, arguments: dict[str, list[str]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with own_directory(out):
        refused = cora(name.partition(" ")[0], *arguments[name], "--output-dir", out)
        assert refused.exit_code == 1
        assert f"{out} is in use by another cora command (process {os.getpid()})" in refused.stderr
        assert [path.name for path in out.iterdir()] == [".lock"]


@pytest.mark.parametrize("name", ["merge", "export", "extract-basis"])
def test_an_output_at_work_refuses_the_second_command(name: str, arguments: dict[str, list[str]], tmp_path: Path) -> None:
    out = tmp_path / "here" / "out"
    with own_output(out):
        refused = cora(name, *arguments[name], "--output", out)
        assert refused.exit_code == 1
        assert f"{out} is in use by another cora command (process {os.getpid()})" in refused.stderr
        assert [path.name for path in out.parent.iterdir()] == [".out.lock"]
    done = cora(name, *arguments[name], "--output", out)
    assert done.exit_code == 0, done.stderr
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "name", ["train", "evaluate", "inspect", "report", "ablate", "demo", "merge", "export", "extract-basis"]
)
def test_an_output_that_is_a_link_is_refused(name: str, arguments: dict[str, list[str]], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    flag = "--output" if name in ("merge", "export", "extract-basis") else "--output-dir"
    refused = cora(name, *arguments[name], flag, tmp_path / "out")
    assert refused.exit_code == 1
    assert f"{tmp_path / 'out'} is a symbolic link to {tmp_path / 'elsewhere'}" in refused.stderr
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.slow
def test_of_two_trainings_started_at_once_one_runs_and_one_is_refused(arguments: dict[str, list[str]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["train", *arguments["train"], "--test-size", "4", "--rank", "4", "--batch-size", "2", "--output-dir", str(out)]
    command = [sys.executable, "-P", "-m", "cora_cli", *words, "--max-steps", "30"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "env": environment, "text": True}
    both = [subprocess.Popen([*command, "--seed", str(seed)], **pipes) for seed in range(2)]
    errors = [process.communicate()[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 1], errors
    winner = codes.index(0)
    # A holder that has already finished leaves a run, which a new one may not take either.
    assert f"(process {both[winner].pid})" in errors[1 - winner] or "already contains a run" in errors[1 - winner]
    record = unsealed(out / "run.json")
    assert (record["status"], record["seeds"]["seed"], len(losses(out))) == ("finished", winner, 30)
