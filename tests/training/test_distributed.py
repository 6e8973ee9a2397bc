"""Two processes with half the batch each are one process with the whole batch, also when they are killed and resumed."""

import functools
import json
import math
import os
import pkgutil
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cora_cli.methods.registry import METHODS, Mode
from cora_cli.training.run import train
from cora_cli.training.trainer import CoraTrainer, Diverged

from .helpers import KILLED, config_for, log_lines, record_of, run_together, settings_of
from .test_methods_with_state import RUNS

# 37 training records in optimizer batches of 4: ten steps an epoch, the last with one record, which leaves the second process a
# ghost; the held-out ones are 3, so that the processes have unequal shares of them.
STEPS = 12
LONG = {"test_size": 3.0, "max_steps": STEPS, "batch_size": 4, "save_steps": 5, "learning_rate": 3e-3}


# Methods whose factors are computed from trained tensors of other shapes, or that layers share.
COMPUTED = ("lorta", "melora", "mora-1", "mora-6", "prolora", "qa-lora", "sharelora-a")
# Those that have no test of their own with two processes, here or in `test_methods_with_state`.
OTHERS: list[Any] = [
    mode for mode, one in METHODS.items() if one.is_adapter and mode not in {"lora", "fb", "increlora", *COMPUTED, *RUNS}
]


def assert_same_results(output: Path, expected: Path) -> None:
    lines, wanted = log_lines(output), log_lines(expected)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for key in ("epoch", "loss", "grad_norm", "learning_rate"):
        assert [line[key] for line in lines] == pytest.approx([line[key] for line in wanted], rel=1e-5)
    ours, theirs = record_of(output), record_of(expected)
    for when in ("before", "after"):
        assert ours["heldout"][when]["loss"] == pytest.approx(theirs["heldout"][when]["loss"], rel=1e-5)
        assert ours["heldout"][when]["n"] == 3
    rows, wanted_rows = ([json.loads(line) for line in (run / "heldout.jsonl").open()] for run in (output, expected))
    assert [row["after"] for row in rows] == pytest.approx([row["after"] for row in wanted_rows], rel=1e-5)
    assert {path.name for path in output.iterdir()} == {path.name for path in expected.iterdir()}
    assert (output / "test.jsonl").read_bytes() == (expected / "test.jsonl").read_bytes()


@pytest.mark.slow
def test_torchrun_gives_the_losses_of_one_process_with_the_whole_batch(
    tiny_model: Path, tiny_data: Path, tiny_basis: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {**LONG, "mode": "fb", "basis": str(tiny_basis)}
    one = config_for(tiny_model, tiny_data, tmp_path / "one", **settings)
    train(one)
    two = {**replace(one, output_dir=str(tmp_path / "two"), batch_size=2).as_dict()}
    (tmp_path / "two.yaml").write_text(json.dumps(two))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    finished = subprocess.run(
        [*launcher, "-m", "cora_cli", "train", "--config", str(tmp_path / "two.yaml")],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert_same_results(tmp_path / "two", tmp_path / "one")
    assert finished.stdout.count("mode fb: 12 steps") == 1
    assert finished.stdout.count("held-out loss") == 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", *COMPUTED])
def test_a_killed_group_resumes_to_the_losses_of_one_process(
    mode: Mode, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    one = config_for(tiny_model, tiny_data, tmp_path / "one", mode=mode, **LONG)
    train(one)
    two = replace(one, output_dir=str(tmp_path / "two"), batch_size=1, gradient_accumulation=2)
    (first, _), _ = run_together(two, kill_at=("cora_cli.training.trainer.append_line", 9))
    assert first == KILLED
    assert [line["step"] for line in log_lines(tmp_path / "two")] == list(range(1, 9))

    assert run_together(replace(two, resume=True)) == [(0, ""), (0, "")]

    assert record_of(tmp_path / "two")["resumed"] == 1
    assert_same_results(tmp_path / "two", tmp_path / "one")


@pytest.fixture(scope="module")
def in_one_launch(
    tiny_model: Path,
    tiny_data: Path,
    tiny_basis: Path,
    tiny_input_basis: Path,
    tiny_sources: tuple[str, ...],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Runs of all `OTHERS` in one process, and in two that train them one after the other."""
    place = tmp_path_factory.mktemp("launch")
    loha = place / "loha.json"
    loha.write_text('{"peft_type": "LOHA", "r": 2, "alpha": 4}')
    short = {"test_size": 3.0, "max_steps": 4, "batch_size": 4, "warmup_ratio": 0.0}
    runs = []
    for mode in OTHERS:
        own = settings_of(mode, tiny_basis, tiny_input_basis, loha, tiny_sources)
        if METHODS[mode].start_from == "models":
            own["start_models"] = tiny_sources
        one = config_for(tiny_model, tiny_data, place / mode / "one", **{**short, **own})
        train(one)
        runs.append(replace(one, output_dir=str(place / mode / "two"), batch_size=2))
    assert run_together(*runs) == [(0, ""), (0, "")]
    return place


@pytest.mark.slow
@pytest.mark.parametrize("mode", OTHERS)
def test_two_processes_are_one_in_every_other_mode(mode: Mode, in_one_launch: Path) -> None:
    one, two = in_one_launch / mode / "one", in_one_launch / mode / "two"
    ours, theirs = record_of(two), record_of(one)
    assert ours["speed"]["steps"] == theirs["speed"]["steps"] == (0 if mode == "mean-delta" else 4)
    for key in ("loss", "grad_norm") if mode != "mean-delta" else ():
        assert [line[key] for line in log_lines(two)] == pytest.approx([line[key] for line in log_lines(one)], rel=1e-4)
    for when in ("before", "after"):
        assert ours["heldout"][when]["loss"] == pytest.approx(theirs["heldout"][when]["loss"], rel=1e-5)
    assert ours["hardware"]["processes"] == 2
    assert ours["parameters"] == theirs["parameters"]
    assert ({**ours["start"], "seconds": 0} if "start" in ours else None) == (
        {**theirs["start"], "seconds": 0} if "start" in theirs else None
    )
    assert ours["fingerprint"].get("start_models_sha256") == theirs["fingerprint"].get("start_models_sha256")
    states = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, two)]
    assert states[0].keys() == states[1].keys()


@pytest.mark.slow
def test_processes_may_need_different_numbers_of_forward_passes(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    model = tmp_path / "longrope"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text())
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0, 3.0, 2.0, 5.0] * 2,
        "original_max_position_embeddings": 60,
    }
    (model / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    one = config_for(model, tiny_data, tmp_path / "one", **LONG)
    train(one)
    assert run_together(replace(one, output_dir=str(tmp_path / "two"), batch_size=2)) == [(0, ""), (0, "")]
    assert_same_results(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_every_process_learns_that_the_directory_is_taken(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    ends = run_together(config_for(tiny_model, tiny_data, tmp_path))
    assert [code for code, _ in ends] == [1, 1]
    assert all("contains other files" in message for _, message in ends)


@pytest.mark.slow
def test_divergence_stops_every_process(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "run", learning_rate=1e30, warmup_ratio=0, max_steps=9, batch_size=1)
    ends = run_together(config)
    assert [code for code, _ in ends] == [1, 1]
    assert all(message.startswith("Diverged: the ") and " at step " in message for _, message in ends)
    assert record_of(tmp_path / "run")["status"] == "failed"


def fail_in(place: str, rank: int) -> None:
    """Let the function `place` of the training's modules fail in process `rank` with an error of a library."""

    def fail(*_: Any, **__: Any) -> None:
        raise ArithmeticError("a library broke")

    if os.environ["RANK"] == str(rank):
        owner, _, name = place.rpartition(".")
        setattr(pkgutil.resolve_name(f"cora_cli.training.{owner}"), name, fail)


@pytest.mark.parametrize("place", [pytest.param("run.open_directory", marks=pytest.mark.slow), "run.write_start"])
def test_an_error_of_a_library_in_the_first_process_ends_all_with_a_sentence(
    place: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "run", max_steps=1)
    assert run_together(config, before=functools.partial(fail_in, place, 0)) == [
        (1, "ArithmeticError: a library broke"),
        (1, "CoraError: the first process of this run failed: ArithmeticError: a library broke"),
    ]


def test_the_end_of_another_process_is_named_as_the_reason(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "run", max_steps=1)
    first, second = run_together(config, before=functools.partial(fail_in, "run.CoraTrainer.compute_loss", 1))
    assert second == (1, "ArithmeticError: a library broke")
    code, message = first
    assert code == 1
    assert message.startswith("CoraError: another process of this run ended or cannot be reached, and its own message says why")
    assert record_of(tmp_path / "run")["status"] == "failed"
    assert record_of(tmp_path / "run")["error"].startswith("another process of this run ended")


def test_one_process_s_nan_is_named_in_all() -> None:
    accelerator = SimpleNamespace(num_processes=2, gather=lambda value: torch.cat([value, torch.tensor([math.nan])]))
    here = SimpleNamespace(accelerator=accelerator, state=SimpleNamespace(global_step=6))
    with pytest.raises(Diverged, match="the loss at step 7 is nan"):
        CoraTrainer._require_usable(here, torch.tensor(2.5), "loss")  # type: ignore[arg-type]
