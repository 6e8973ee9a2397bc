"""`--shard fsdp` divides the weights among processes and changes nothing else: losses, results and checkpoints are those without it."""

import functools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from cora_cli.adapters.merge import merge_adapter
from cora_cli.errors import CoraError
from cora_cli.models.references import resolve_model
from cora_cli.planning.page import USABLE
from cora_cli.rundir import RunDirectory
from cora_cli.training import fitting
from cora_cli.training import run as training
from cora_cli.training.preflight import Measured, preflight
from cora_cli.training.run import train

from .helpers import config_for, log_lines, losses, record_of, run_together

# Nine examples are two optimizer batches of four and one of one, in which the second process has a ghost. The three held-out records
# and rows of at most 64 tokens give the processes different numbers of forward passes.
SHORT: dict[str, Any] = {
    "limit": 9,
    "test_size": 3.0,
    "validation_size": 2,
    "max_steps": 4,
    "batch_size": 4,
    "learning_rate": 3e-3,
}
MODES: dict[str, dict[str, Any]] = {
    "lora": {"dropout": 0.1, "gradient_checkpointing": True},
    "dora": {},
    "pissa": {},
    "vera": {},
    "lora-rite": {},
    "cola": {},
    "lorta": {},
    "clora": {},
}


def result_of(output: Path) -> dict[str, torch.Tensor]:
    run = RunDirectory(output)
    return load_file(next(path for root in (run.adapter, run.model) for path in root.glob("*.safetensors")))


@pytest.mark.slow
def test_a_sharded_run_stopped_and_resumed_is_that_of_one_process(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    runs = []
    for mode in ("lora", "full"):
        one = config_for(tiny_model, tiny_data, tmp_path / mode, mode=mode, **SHORT)
        train(one)
        rows: dict[str, Any] = {"tokens_per_row": 64} if mode == "lora" else {"gradient_checkpointing": True}
        complete = replace(one, output_dir=str(tmp_path / f"{mode}-complete"), batch_size=2, shard="fsdp", **rows)
        parts = replace(complete, output_dir=str(tmp_path / f"{mode}-parts"))
        runs += [complete, replace(parts, stop_at=2), replace(parts, resume=True)]
    # A checkpoint is that of a run that is not sharded.
    other = replace(complete, output_dir=str(tmp_path / "other"))
    runs += [replace(other, stop_at=2), replace(other, resume=True, shard="none")]
    assert run_together(*runs) == [(0, ""), (0, "")]

    for mode in ("lora", "full"):
        one, complete, parts = (tmp_path / name for name in (mode, f"{mode}-complete", f"{mode}-parts"))
        lines, wanted = log_lines(complete), log_lines(one)
        for key in ("step", "loss", "grad_norm", "tokens"):
            rounding = 1e-4 if key == "grad_norm" else 1e-5  # a sum over all weights, in another order
            assert [line[key] for line in lines] == pytest.approx([line[key] for line in wanted], rel=rounding), (mode, key)
        record, expected = record_of(complete), record_of(one)
        assert record["hardware"]["shard"] == "fsdp"
        assert "shard" not in expected["hardware"]
        assert record["parameters"] == expected["parameters"]
        for when in ("before", "after"):
            assert record["heldout"][when]["loss"] == pytest.approx(expected["heldout"][when]["loss"], rel=1e-5)
        tensors, same = result_of(complete), result_of(one)
        assert tensors.keys() == same.keys()
        assert all(torch.allclose(tensors[key], same[key], rtol=1e-3, atol=1e-5) for key in same)
        assert log_lines(parts) == lines
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in result_of(parts).items())
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "full"), rel=1e-5)
    architectures = [json.loads((tmp_path / name / "model" / "config.json").read_text()) for name in ("full", "full-complete")]
    assert architectures[0] == architectures[1]


def keep_gradients(capacity: int | None) -> None:
    """Let each run of this process write its first gradients, and take the processor for a GPU of so many bytes."""
    fitting._capacity = lambda device: capacity

    class Keeping(training.CoraTrainer):
        def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
            place = self._root.parent / f"gradients-{self.args.process_index}.safetensors"
            if not place.exists():
                found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
                save_file(
                    {name: (one.full_tensor() if isinstance(one, DTensor) else one).clone() for name, one in found.items()},
                    place,
                )
            return super()._get_grad_norm(model, grad_norm)

    training.CoraTrainer = Keeping


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_rows_that_do_not_fit_are_split_in_a_divided_run_with_the_same_gradients(
    mode: str, tiny_model: Path, tmp_path: Path
) -> None:
    data = tmp_path / "long.jsonl"
    numbers = (" ".join(map(str, range(n, n + 25))) for n in range(14))
    data.write_text("".join(json.dumps({"instruction": f"Count {n}.", "output": one}) + "\n" for n, one in enumerate(numbers)))
    long = {**SHORT, "limit": 8, "batch_size": 4, "max_steps": 1, "max_grad_norm": 0.0, "eval_limit": 1, "shard": "fsdp"}
    plain = config_for(tiny_model, data, tmp_path / "plain", mode=mode, **long)
    planned = replace(plain, dry_run=True, processes=2)
    half = preflight(replace(planned, tokens_per_row=preflight(planned).largest // 2)).measured
    assert isinstance(half, Measured)
    assert run_together(plain, before=functools.partial(keep_gradients, None)) == [(0, ""), (0, "")]
    capacity = math.ceil(half.memory.total / USABLE)
    split = replace(plain, output_dir=str(tmp_path / "split"))
    assert run_together(split, before=functools.partial(keep_gradients, capacity)) == [(0, ""), (0, "")]
    rows = [yaml.safe_load((tmp_path / name / "config.yaml").read_text()).get("tokens_per_row") for name in ("plain", "split")]
    assert rows[0] is None
    assert rows[1] is not None
    assert losses(tmp_path / "split") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)
    for rank in range(2):
        whole, parts = (load_file(tmp_path / name / f"gradients-{rank}.safetensors") for name in ("plain", "split"))
        assert whole.keys() == parts.keys()
        for name, gradient in whole.items():
            assert torch.allclose(parts[name], gradient, rtol=0, atol=1e-6 * gradient.abs().max().item()), name


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_on_a_sharded_base_trains_to_the_same_bits(
    mode: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    settings = {**SHORT, "batch_size": 2, "mode": mode, "dtype": "bf16", **MODES[mode]}
    plain = config_for(tiny_model, tiny_data, tmp_path / "plain", **settings)
    sharded = replace(plain, output_dir=str(tmp_path / "sharded"), shard="fsdp")
    assert run_together(plain, sharded) == [(0, ""), (0, "")]
    assert log_lines(tmp_path / "sharded") == log_lines(tmp_path / "plain")
    tensors = result_of(tmp_path / "sharded")
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in result_of(tmp_path / "plain").items())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_four_processes_are_one_and_their_adapter_merges(mode: str, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    one = config_for(tiny_model, tiny_data, tmp_path / "one", mode=mode, **SHORT)
    train(one)
    four = replace(one, output_dir=str(tmp_path / "four"), batch_size=1, shard="fsdp")
    assert run_together(four, world=4) == [(0, "")] * 4
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    tensors, same = result_of(tmp_path / "four"), result_of(tmp_path / "one")
    assert all(torch.allclose(tensors[key], same[key], rtol=1e-3, atol=1e-5) for key in same)
    if mode == "lora":
        merged = []
        for name in ("one", "four"):
            merge_adapter(resolve_model(str(tmp_path / name)), tmp_path / f"merged-{name}")
            merged.append(load_file(tmp_path / f"merged-{name}" / "model.safetensors"))
        assert all(torch.allclose(merged[0][key], merged[1][key], atol=1e-5) for key in merged[0])


def test_sharding_in_one_process_is_refused(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(CoraError, match="--shard fsdp divides the model among processes, and there is only one; start several"):
        train(config_for(tiny_model, tiny_data, tmp_path / "run", shard="fsdp"))
    assert not (tmp_path / "run").exists()
