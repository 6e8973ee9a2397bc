"""How training runs fail: divergence, full disks, and models that packed rows do not suit."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, T5Config

from cora_cli import writing
from cora_cli.errors import CoraError
from cora_cli.training.run import train
from tests.conftest import VOCABULARY

from .helpers import RunProcess, checkpoint_names, config_for, log_lines, losses, record_of

START = {"run.json", "config.yaml", "test.jsonl", "trained_prompts.txt"}
"""The files that a run writes before its first step."""


def test_divergence_stops_the_run_and_names_step_and_checkpoint(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "run", mode="full", learning_rate=1e30, max_steps=9, save_steps=1)
    with pytest.raises(CoraError) as caught:
        train(config)
    lines = log_lines(tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / f"checkpoint-{lines[-1]['step']}"
    assert f"at step {lines[-1]['step'] + 1} is " in str(caught.value)
    assert f"the last complete checkpoint is {last}; --resume continues from it" in str(caught.value)
    record = record_of(tmp_path / "run")
    assert record["status"] == "failed"
    assert "stopped before the weights changed" in record["error"]
    assert all(line["loss"] is not None for line in lines)
    model = AutoModelForCausalLM.from_pretrained(last)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert not (tmp_path / "run" / "model").exists()


def test_a_run_that_diverged_without_a_checkpoint_is_replaced_by_one_with_other_settings(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    config = config_for(tiny_model, tiny_data, output, mode="full", learning_rate=1e30, max_steps=9, save_steps=50)
    for _ in range(2):
        with pytest.raises(CoraError, match="there was no checkpoint yet, so another training may take its place"):
            train(config)
    assert len(log_lines(output)) >= 1
    (output / "eval").mkdir()
    with pytest.raises(CoraError, match="already contains a run"):
        train(replace(config, learning_rate=1e-4, max_steps=1))
    (output / "eval").rmdir()
    assert train(replace(config, learning_rate=1e-4, max_steps=1))["status"] == "finished"
    assert [line["step"] for line in log_lines(output)] == [1]
    assert f"the run in {output} had failed without a checkpoint: it is replaced" in capfd.readouterr().err


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_run_that_no_gradient_reaches_is_refused_before_it_changes_anything(
    max_grad_norm: float, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "deaf"))
    weights = load_file(model / "model.safetensors")
    silent = {name: torch.zeros_like(one) if "o_proj" in name else one for name, one in weights.items()}
    save_file(silent, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CoraError, match="gradient of everything that this run trains is exactly zero at step 1"):
        train(config_for(model, tiny_data, tmp_path / "run", max_grad_norm=max_grad_norm))
    assert record_of(tmp_path / "run")["status"] == "failed"


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_an_infinite_gradient_stops_the_run_with_and_without_clipping(
    max_grad_norm: float, tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "run", max_grad_norm=max_grad_norm, save_steps=1)
    original = torch.Tensor.backward

    def overflowing(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        step = len(losses(tmp_path / "run")) + 1 if (tmp_path / "run" / "log.jsonl").exists() else 1
        original(self * (float("inf") if step == 2 else 1.0), *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", overflowing)
    with pytest.raises(
        CoraError, match=r"the gradient norm at step 2 is (nan|inf): .*the last complete checkpoint is .*checkpoint-1"
    ):
        train(config)
    assert len(losses(tmp_path / "run")) == 1


def test_a_result_that_is_no_number_fails_the_run(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    # The only step makes the weights huge, which nothing but the held-out loss can notice any more.
    config = config_for(tiny_model, tiny_data, tmp_path / "run", learning_rate=1e30, max_steps=1, warmup_ratio=0)
    with pytest.raises(
        CoraError, match=r"held-out loss after training is (nan|inf): .*last complete checkpoint is .*checkpoint-1"
    ):
        train(config)
    assert record_of(tmp_path / "run")["status"] == "failed"


@pytest.mark.parametrize("test_size", [4.0, 0.0])
def test_a_model_that_computes_no_numbers_is_not_trained(
    test_size: float, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"][:] = 3e38  # finite, with products that are not
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    what = "held-out loss before training" if test_size else "loss at step 1"
    config = config_for(tmp_path / "model", tiny_data, tmp_path / "run", test_size=test_size)
    with pytest.raises(CoraError, match=f"the {what} is (nan|inf): .*there was no checkpoint yet"):
        train(config)
    assert record_of(tmp_path / "run")["status"] == "failed"
    assert not (tmp_path / "run" / "adapter").exists()
    # No step was taken, so the corrected command may use the directory.
    assert train(replace(config, model=str(tiny_model)))["status"] == "finished"


@pytest.mark.parametrize(
    ("mode", "limit", "written"),
    [
        pytest.param("lora", 1_000, set(), id="before the first file"),
        pytest.param("lora", 8_000, START | {"log.jsonl", "checkpoints"}, id="in a checkpoint"),
        pytest.param("full", 100_000, START | {"log.jsonl", "checkpoints"}, id="in the model"),
    ],
)
def test_a_file_that_cannot_be_written_ends_the_run_with_one_sentence_and_leaves_whole_files(
    mode: str, limit: int, written: set[str], tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    code, message = RunProcess(config_for(tiny_model, tiny_data, output, mode=mode), file_limit=limit).wait()
    assert (code, message.partition(":")[0]) == (1, "CoraError")
    assert "a file would be larger than `ulimit -f`" in message
    assert "\n" not in message
    assert {path.name for path in output.glob("*")} == written
    assert checkpoint_names(output) == []
    if written:
        assert record_of(output)["status"] == "failed"
        assert len(losses(output)) == 3


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_result_that_does_not_fit_on_the_disk_is_not_left_half_written(
    mode: str, tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "run", mode=mode, max_steps=1)
    target = "cora_cli.adapters.storage.save_file" if mode == "lora" else "transformers.LlamaForCausalLM.save_pretrained"

    def full(*args: Any, **_: Any) -> None:
        directory = args[1].parent if mode == "lora" else Path(args[1])
        directory.mkdir(parents=True, exist_ok=True)
        if "checkpoints" in str(directory):
            return
        (directory / "half").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(target, full)
    with pytest.raises(CoraError, match="the disk is full"):
        train(config)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == START | {"log.jsonl", "checkpoints"}
    assert record_of(tmp_path / "run")["status"] == "failed"
    assert checkpoint_names(tmp_path / "run") == ["checkpoint-1"]

    monkeypatch.undo()
    if mode == "lora":
        assert train(replace(config, resume=True))["status"] == "finished"


def test_the_record_of_a_run_says_what_a_full_disk_is_in_torchs_words(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 8192 vs 8084")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CoraError, match="the disk is full"):
        train(config_for(tiny_model, tiny_data, tmp_path / "run", mode="lora", max_steps=1))
    assert record_of(tmp_path / "run")["error"].startswith("the disk is full")


def test_a_model_that_predicts_no_next_token_is_refused_before_anything_is_written(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    model = tmp_path / "t5"
    shutil.copytree(tiny_model, model)
    T5Config(vocab_size=VOCABULARY, d_model=32, num_layers=1, num_heads=2).save_pretrained(model)
    with pytest.raises(CoraError, match="is a t5 model, which transformers does not load as a causal language model"):
        train(config_for(model, tiny_data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_four_bits_are_refused_without_the_package_before_anything_is_written(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cora_cli.models.quantized.find_spec", lambda name: None)
    with pytest.raises(CoraError, match=r"--load-in-4bit needs the package bitsandbytes: pip install 'cora-cli\[four-bit\]'"):
        train(config_for(tiny_model, tiny_data, tmp_path / "run", load_in_4bit=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_a_run_that_ended_before_its_first_step_is_replaced_by_one_with_other_settings(
    status: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "run", max_steps=1)
    train(config)
    record = record_of(tmp_path / "run") | {"status": status}
    for path in (tmp_path / "run").iterdir():
        if path.name not in START:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    writing.write_json(tmp_path / "run" / "run.json", record)
    train(replace(config, learning_rate=1e-5))
    assert record_of(tmp_path / "run")["status"] == "finished"
    assert record_of(tmp_path / "run")["fingerprint"]["settings"]["learning_rate"] == 1e-5
    writing.write_json(tmp_path / "run" / "run.json", record_of(tmp_path / "run") | {"status": status})
    with pytest.raises(CoraError, match="already contains a run"):
        train(config)
