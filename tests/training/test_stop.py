"""A run that stops at a step and continues later is, to the last bit, the run that did not stop."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from cora_cli import writing
from cora_cli.cli.train import summary
from cora_cli.errors import CoraError, UsageError
from cora_cli.reading import read_json, read_yaml
from cora_cli.training.config import TrainConfig
from cora_cli.training.run import train
from tests.conftest import VOCABULARY

from .helpers import checkpoint_names, config_for, log_lines, record_of

STEPS = 8
SETTINGS: dict[str, Any] = {
    "mode": "lora",
    "test_size": 2.0,
    "validation_size": 4,
    "max_steps": STEPS,
    "batch_size": 2,
    "lr_schedule": "constant-decay",
    "save_steps": 100,
}


@pytest.fixture
def config(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> TrainConfig:
    return config_for(tiny_model, tiny_data, tmp_path / "run", **SETTINGS)


def test_a_run_that_stops_twice_ends_as_the_run_that_did_not(config: TrainConfig, tmp_path: Path) -> None:
    complete = replace(config, output_dir=str(tmp_path / "complete"))
    train(complete)
    for stop in (2, 5):
        record = train(replace(config, stop_at=stop, resume=True))
        assert (record["status"], record["speed"]["steps"]) == ("stopped", stop)
        assert not (tmp_path / "run" / "adapter").exists()
    losses = [json.loads((tmp_path / "run" / "stops" / f"{stop}.json").read_text())["validation"]["loss"] for stop in (2, 5)]
    assert losses[0] != losses[1]
    finished = train(replace(config, resume=True))
    assert finished["status"] == "finished"
    assert log_lines(tmp_path / "run") == log_lines(tmp_path / "complete")
    assert finished["validation"] == record_of(tmp_path / "complete")["validation"]
    found, wanted = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("run", "complete"))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_all_weights_continue_where_transformers_fuses_the_experts(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    shape = MixtralConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, initializer_range=0.2, **sizes)
    torch.manual_seed(0)
    MixtralForCausalLM(shape).save_pretrained(tmp_path / "experts")
    for file in tiny_model.glob("*token*"):
        shutil.copy(file, tmp_path / "experts")
    settings = {**SETTINGS, "mode": "full", "max_steps": 4}
    complete = config_for(tmp_path / "experts", tiny_data, tmp_path / "complete", **settings)
    train(complete)
    train(replace(complete, output_dir=str(tmp_path / "run"), stop_at=2))
    train(replace(complete, output_dir=str(tmp_path / "run"), resume=True))
    assert log_lines(tmp_path / "run") == log_lines(tmp_path / "complete")


@pytest.mark.slow
def test_the_loss_at_a_stop_is_that_of_a_run_of_so_many_steps_at_a_constant_rate(config: TrainConfig, tmp_path: Path) -> None:
    train(replace(config, stop_at=4))
    short = replace(config, output_dir=str(tmp_path / "short"), max_steps=4, lr_schedule="constant")
    stopped = json.loads((tmp_path / "run" / "stops" / "4.json").read_text())
    assert stopped["validation"] == train(short)["validation"]


@pytest.mark.slow
def test_a_stop_that_lost_its_file_is_measured_again(config: TrainConfig, tmp_path: Path) -> None:
    train(replace(config, stop_at=3))
    assert checkpoint_names(tmp_path / "run") == ["checkpoint-3"]
    written = (tmp_path / "run" / "stops" / "3.json").read_bytes()
    (tmp_path / "run" / "stops" / "3.json").unlink()
    train(replace(config, stop_at=3, resume=True))
    assert (tmp_path / "run" / "stops" / "3.json").read_bytes() == written
    assert [line["step"] for line in log_lines(tmp_path / "run")] == [1, 2, 3]


def test_a_stop_that_is_done_takes_no_step(config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(replace(config, stop_at=3))
    # Else `--config` of the run with `--resume` would stop there for ever, since no flag unsets it.
    assert "stop_at" not in read_yaml(tmp_path / "run" / "config.yaml", "configuration")
    train(replace(config, stop_at=5, resume=True))
    train(replace(config, stop_at=3, resume=True))
    assert "has already stopped at step 3" in capsys.readouterr().err
    stop = tmp_path / "run" / "stops" / "3.json"
    writing.write_json(stop, {**read_json(stop), "step": 4})
    with pytest.raises(CoraError, match=r"3.json was changed after it was written; restore it"):
        train(replace(config, stop_at=3, resume=True))


def test_a_step_that_the_run_has_passed_is_refused(config: TrainConfig) -> None:
    train(replace(config, stop_at=5))
    with pytest.raises(CoraError, match="cannot stop at step 3, which it has already passed; remove it to train it again"):
        train(replace(config, stop_at=3, resume=True))


def test_stops_that_cannot_be(config: TrainConfig) -> None:
    with pytest.raises(CoraError, match="--stop-at must be below the 8 steps of the run, not 8"):
        train(replace(config, stop_at=8))
    with pytest.raises(UsageError, match="--stop-at must be at least 1, not 0"):
        replace(config, stop_at=0)
    with pytest.raises(UsageError, match="--stop-at needs --validation-size"):
        replace(config, stop_at=2, validation_size=None)
    with pytest.raises(UsageError, match="leave out --no-validation-loss"):
        replace(config, stop_at=2, validation_loss=False)


def test_the_rate_is_constant_and_then_decays_over_the_last_fifth(config: TrainConfig, tmp_path: Path) -> None:
    train(replace(config, max_steps=10, warmup_ratio=0.2))
    rates = [line["learning_rate"] / config.learning_rate for line in log_lines(tmp_path / "run")]
    assert rates == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 1, 1, 0.5])


def test_the_command_says_where_it_stopped(config: TrainConfig) -> None:
    record = train(replace(config, stop_at=3))
    assert summary(record).startswith("stopped at step 3: validation loss ")
