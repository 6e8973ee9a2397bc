"""Rows that do not fit a GPU are split before the run, and a full GPU ends in the setting that would fit."""

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cora_cli.data.batches import BatchForm, Collator
from cora_cli.data.encode import Example
from cora_cli.device import planned_hardware
from cora_cli.errors import CoraError
from cora_cli.planning.page import USABLE
from cora_cli.training import fitting
from cora_cli.training import run as training
from cora_cli.training.config import TrainConfig
from cora_cli.training.preflight import plan_run, preflight
from cora_cli.training.prepare import Prepared, prepare
from tests.training.helpers import config_for, losses, measured


def test_rows_of_fewer_tokens_give_the_same_gradients(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[dict[str, torch.Tensor]] = []

    class Kept(training.CoraTrainer):
        def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            return super()._get_grad_norm(model, grad_norm)

    monkeypatch.setattr(training, "CoraTrainer", Kept)
    for mode in ("lora", "full"):
        found.clear()
        for number, tokens in enumerate((None, 120)):
            own = {"mode": mode, "max_grad_norm": 0.0, "max_steps": 1, "tokens_per_row": tokens}
            training.train(config_for(tiny_model, tiny_data, tmp_path / f"{mode}{number}", **own))
        assert losses(tmp_path / f"{mode}0") == pytest.approx(losses(tmp_path / f"{mode}1"), rel=1e-6)
        for name, gradient in found[0].items():
            assert torch.allclose(found[1][name], gradient, rtol=0, atol=1e-5 * gradient.abs().max().item()), name


@pytest.mark.parametrize("form", [BatchForm("packed", True), BatchForm("packed"), BatchForm("padded")], ids=str)
def test_a_long_batch_is_split_into_rows_of_at_most_so_many_tokens(form: BatchForm) -> None:
    prefix = list(range(100, 130))
    examples = [Example([*(prefix if n % 2 else []), *range(n, n + 10 + n)], 5) for n in range(12)]
    short = dataclasses.replace(form, tokens_per_row=70)
    parts = short.passes(examples)
    assert sorted(index for part in parts for index in part) == list(range(12))
    assert len(parts) > 1
    assert max(form.tokens([examples[index] for index in part]) for part in parts) <= 70
    batch = Collator(short)([(example, False) for example in examples])
    assert len(batch["passes"]) == len(parts)
    assert len(batch["labels"]) == sum(len(example.input_ids) - 5 for example in examples)


def test_a_row_shorter_than_an_example_is_refused(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CoraError, match=r"--tokens-per-row must be at least \d+, the tokens of the longest training example, not 9"
    ):
        training.train(config_for(tiny_model, tiny_data, tmp_path / "run", tokens_per_row=9))


@pytest.mark.slow
def test_rows_that_do_not_fit_the_gpu_are_split_before_the_run(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "run", batch_size=16, device="cuda", dtype="bf16")
    prepared = prepare(config, planned=planned_hardware("cuda", "bf16"))
    needed = measured(fitting.plan_run(config, prepared)).memory.total
    monkeypatch.setattr(fitting, "_capacity", lambda device: needed * 0.8 / USABLE)
    fitted = fitting.fit_rows(config, prepared)
    assert fitted.tokens_per_row is not None
    assert dataclasses.replace(fitted, tokens_per_row=None) == config
    assert measured(fitting.plan_run(fitted, prepared)).memory.total <= needed * 0.8
    assert f"rows are split at {fitted.tokens_per_row} tokens, as with --tokens-per-row" in capsys.readouterr().err

    monkeypatch.setattr(fitting, "_capacity", lambda device: 2**20)
    assert fitting.fit_rows(config, prepared) == config
    monkeypatch.setattr(fitting, "plan_run", lambda *_: pytest.fail("a run that is far from filling the GPU needs no plan"))
    monkeypatch.setattr(fitting, "_capacity", lambda device: 4 * needed)
    assert fitting.fit_rows(config, prepared) == config
    chosen = dataclasses.replace(config, tokens_per_row=500)
    monkeypatch.setattr(fitting, "_capacity", lambda device: 1)
    assert fitting.fit_rows(chosen, prepared) == chosen


def fit_divided(settings: dict[str, Any], model: Path, data: Path, place: Path) -> tuple[TrainConfig, Prepared]:
    """A run of two processes that divide a model, planned in one."""
    several: dict[str, Any] = {"dry_run": True, "processes": 2, "shard": "fsdp", "device": "cuda", "dtype": "bf16"}
    config = config_for(model, data, place / "run", batch_size=16, **several, **settings)
    return config, prepare(config, planned=planned_hardware("cuda", "bf16"))


@pytest.mark.slow
def test_rows_of_a_divided_run_that_do_not_fit_the_gpu_are_split(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, prepared = fit_divided({}, tiny_model, tiny_data, tmp_path)
    needed = measured(plan_run(config, prepared)).memory.total
    monkeypatch.setattr(fitting, "_capacity", lambda device: needed * 0.8 / USABLE)
    # Only in another process can it be planned next to a process group.
    monkeypatch.setattr(fitting, "plan_run", lambda *_: pytest.fail("planned in the process of the run"))
    fitted = fitting.fit_rows(config, prepared)
    assert fitted.tokens_per_row is not None
    assert dataclasses.replace(fitted, tokens_per_row=None) == config
    assert measured(plan_run(fitted, prepared)).memory.total <= needed * 0.8
    assert f"rows are split at {fitted.tokens_per_row} tokens, as with --tokens-per-row" in capsys.readouterr().err


def test_a_divided_run_says_where_its_rows_cannot_be_planned(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, prepared = fit_divided({}, tiny_model, tiny_data, tmp_path)
    rough = fitting.rough_peak(config, prepared)
    assert rough < fitting.rough_peak(dataclasses.replace(config, shard="none"), prepared)
    monkeypatch.setattr(fitting, "_capacity", lambda device: rough)
    monkeypatch.setattr(fitting.sys, "executable", shutil.which("false"))
    assert fitting.fit_rows(config, prepared) == config
    said = capsys.readouterr().err
    assert (
        "could not be computed (exit code 1); `cora train … --dry-run --processes 2` with the same settings computes it" in said
    )
    monkeypatch.setattr(fitting, "_capacity", lambda device: 4 * rough)
    assert fitting.fit_rows(config, prepared) == config
    assert "--dry-run" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_full_gpu_of_a_divided_run_ends_in_the_setting_or_the_processes_that_would_fit(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    config, prepared = fit_divided({"mode": "full"}, tiny_model, tiny_data, tmp_path)
    longest = max(len(example.input_ids) for example in prepared.train.examples)

    def needed(**changes: Any) -> int:
        return measured(plan_run(dataclasses.replace(config, **changes), prepared)).memory.total

    def said(capacity: float) -> str:
        return fitting.what_would_fit(config, prepared, math.ceil(capacity))

    short = needed(tokens_per_row=longest)
    sentence = said(needed() * 0.8 / USABLE)
    assert sentence.startswith("the GPU ran out of memory: each of the 2 processes of this run takes 0.")
    tokens = int(sentence.partition("--tokens-per-row ")[2].split()[0])
    assert short <= needed(tokens_per_row=tokens) <= needed() * 0.8

    least = {"tokens_per_row": longest, "gradient_checkpointing": True}
    four = needed(**least, processes=4)
    assert four < 0.95 * needed(**least)
    flags = f"--gradient-checkpointing --tokens-per-row {longest}"
    assert f"no length of its rows fits, and 4 processes with {flags} would fit with 0." in said(four / USABLE)
    assert said(2**20).endswith("no length of its rows fits, nor do 32 processes, so use a larger GPU or a smaller model")


@pytest.mark.slow
def test_a_full_gpu_of_a_divided_run_is_planned_in_another_process(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, prepared = fit_divided({}, tiny_model, tiny_data, tmp_path)
    capacity = int(measured(plan_run(config, prepared)).memory.total * 0.8 / USABLE)
    expected = fitting.what_would_fit(config, prepared, capacity)
    monkeypatch.setattr(fitting, "_capacity", lambda device: capacity)
    monkeypatch.setattr(fitting, "plan_run", lambda *_: pytest.fail("planned in the process of the run"))
    assert str(fitting.out_of_memory(config, prepared)) == expected


def test_a_full_gpu_of_a_divided_run_that_cannot_be_planned_names_what_takes_less(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, prepared = fit_divided({}, tiny_model, tiny_data, tmp_path)
    monkeypatch.setattr(fitting, "_capacity", lambda device: 2**30)
    monkeypatch.setattr(fitting.sys, "executable", shutil.which("false"))
    longest = max(len(example.input_ids) for example in prepared.train.examples)
    assert str(fitting.out_of_memory(config, prepared)) == (
        "the GPU of 1.0 GiB ran out of memory, and how much this run takes cannot be computed (exit code 1); "
        f"--tokens-per-row {longest}, --gradient-checkpointing, more processes or a smaller --batch-size takes less"
    )


@pytest.mark.slow
def test_a_full_gpu_ends_in_the_setting_that_would_fit(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "run", batch_size=16)
    needed = measured(preflight(config)).memory.total

    class Full(training.CoraTrainer):
        def compute_loss(self, *_: Any, **__: Any) -> torch.Tensor:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(training, "CoraTrainer", Full)
    # Otherwise the run would split its rows itself.
    monkeypatch.setattr(training, "fit_rows", lambda config, prepared: config)
    monkeypatch.setattr(fitting, "_capacity", lambda device: needed * 0.8 / USABLE)
    with pytest.raises(
        CoraError, match=r"--tokens-per-row \d+ would fit with 0\.\d GiB; there was no checkpoint yet"
    ) as caught:
        training.train(config)
    assert "\n" not in str(caught.value)
    tokens = int(str(caught.value).partition("--tokens-per-row ")[2].split()[0])
    assert measured(preflight(dataclasses.replace(config, tokens_per_row=tokens))).memory.total <= needed * 0.8
    monkeypatch.setattr(fitting, "_capacity", lambda device: 2**20)
    with pytest.raises(CoraError, match="no length of its rows fits"):
        training.train(dataclasses.replace(config, output_dir=str(tmp_path / "smaller")))
