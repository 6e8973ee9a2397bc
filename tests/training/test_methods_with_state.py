"""Every method is, killed and resumed, the run that was not; where one acts in every step, two processes are one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cora_cli.methods.registry import METHODS, Mode
from cora_cli.training.run import train

from .helpers import KILLED, RunProcess, config_for, log_lines, record_of, run_together, settings_of

# 38 training records in batches of 4: ten steps an epoch, of which the last has half a batch.
LONG: dict[str, Any] = {"test_size": 2.0, "max_steps": 12, "batch_size": 4, "save_steps": 5, "dropout": 0.1}
RUNS: dict[str, dict[str, Any]] = {
    "clora": {"clora_weight": 0.1, "clora_rank": 16},
    "flat-lora": {},
    "lora-rite": {},
    "scalabl": {"kl_learning_rate": 5.0},
    "dylora": {},
    "cola": {},
    "xgblora": {"rank": 1, "booster_steps": 3, "booster_blocks": 1, "booster_penalty": 0.01},
    "lori": {},
    "lora-sb": {"learning_rate": 3e-2},
    "lora-ga": {"learning_rate": 3e-3, "start_examples": 12},
    "vb-lora": {"bank_vectors": 20, "bank_length": 16},
    "increlora": {"growth_warmup": 2, "growth_interval": 2, "growth_layers": 3},
    "adalora": {},
    "lora-xs": {"learning_rate": 3e-3},
    "lora-mini": {},
}
"""Methods that act in a step, or whose start is computed from data."""
# What a checkpoint has to hold beyond the trained tensors: shared factors, a start from models, a form that is no LoRA.
QUICK = ("sharelora-b",)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param(mode, marks=() if mode in QUICK else pytest.mark.slow)
        for mode, method in METHODS.items()
        if method.is_adapter and mode != "mean-delta"  # which trains nothing
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(
    mode: Mode,
    tiny_model: Path,
    tiny_data: Path,
    tiny_basis: Path,
    tiny_input_basis: Path,
    tiny_sources: tuple[str, ...],
    tmp_path: Path,
) -> None:
    loha = tmp_path / "loha.json"
    loha.write_text('{"peft_type": "LOHA", "r": 2, "alpha": 4}')
    own = RUNS.get(mode) or settings_of(mode, tiny_basis, tiny_input_basis, loha, tiny_sources)
    settings = {**LONG, "batch_size": 2, "gradient_accumulation": 2, **own, "mode": mode}
    expected = config_for(tiny_model, tiny_data, tmp_path / "expected", **settings)
    train(expected)
    config = replace(expected, output_dir=str(tmp_path / "run"))
    assert RunProcess(config, kill_at=("cora_cli.training.trainer.append_line", 8)).wait() == (KILLED, "")

    train(replace(config, resume=True))

    assert log_lines(tmp_path / "run") == log_lines(tmp_path / "expected")
    ours, theirs = record_of(tmp_path / "run"), record_of(tmp_path / "expected")
    assert ours["heldout"] == theirs["heldout"]
    assert ours["parameters"] == theirs["parameters"]
    found, wanted = weights(tmp_path / "run"), weights(tmp_path / "expected")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [mode for mode in RUNS if METHODS[mode].runs_in_several_processes])
def test_two_processes_and_micro_batches_are_one_batch(mode: str, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    one = config_for(tiny_model, tiny_data, tmp_path / "one", **{**LONG, "mode": mode, "dropout": 0.0, **RUNS[mode]})
    train(one)
    two = replace(one, output_dir=str(tmp_path / "two"), batch_size=1, gradient_accumulation=2)
    assert run_together(two) == [(0, ""), (0, "")]
    lines, wanted = log_lines(tmp_path / "two"), log_lines(tmp_path / "one")
    assert [line["step"] for line in lines] == list(range(1, 13))
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in lines] == pytest.approx([line[key] for line in wanted], rel=1e-4)
    losses = (record_of(tmp_path / name)["heldout"]["after"]["loss"] for name in ("two", "one"))
    assert next(losses) == pytest.approx(next(losses), rel=1e-4)


@pytest.mark.slow
def test_a_method_that_grows_refuses_several_processes(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    ends = run_together(config_for(tiny_model, tiny_data, tmp_path / "run", mode="increlora"))
    said = "CoraError: mode increlora changes its number of parameters and runs in one process only, not in 2"
    assert ends == [(1, said), (1, said)]
    assert not (tmp_path / "run").exists()
