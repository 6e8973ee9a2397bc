"""A run in every mode of the table: it learns, keeps frozen what it says, resumes to the same bits, and is stored so that others read it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cora_cli.adapters.export import export_adapter
from cora_cli.adapters.loading import load_adapter
from cora_cli.adapters.merge import merge_adapter
from cora_cli.errors import CoraError
from cora_cli.methods.registry import METHODS
from cora_cli.models.references import resolve_model
from cora_cli.rundir import RunDirectory
from cora_cli.training.arguments import training_arguments
from cora_cli.training.assemble import assemble
from cora_cli.training.config import TrainConfig
from cora_cli.training.prepare import prepare
from cora_cli.training.run import train

from .helpers import config_for, log_lines, losses, record_of, settings_of

IDS = torch.tensor([[1, 5, 9, 100, 7, 3, 2, 40]])
Run = tuple[TrainConfig, Path, dict[str, Any]]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def base_of(config: TrainConfig) -> Any:
    return AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).eval()


def ranks_of(output: Path) -> dict[str, int]:
    """The rank of each layer in the stored LoRA of a run: its rows of A that are not just filled up with zeros."""
    state = load_file(output / "adapter" / "adapter_model.safetensors")
    ends = ("base_model.model.", ".lora_A.weight")
    factors = {key.removeprefix(ends[0]).removesuffix(ends[1]): a for key, a in state.items() if ".lora_A." in key}
    return {name: int(a.any(dim=1).sum()) for name, a in factors.items()}


# One mode of each kind of start, storage and optimizer; the others differ from one of these in their start only.
QUICK = (*("lora", "fb", "fa-basis", "vera", "peft"),)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(mode, marks=() if mode in QUICK else pytest.mark.slow)
        for mode, method in METHODS.items()
        if method.is_adapter and mode != "mean-delta"  # which trains nothing
    ],
)
def finished(
    request: pytest.FixtureRequest,
    tiny_model: Path,
    tiny_data: Path,
    tiny_basis: Path,
    tiny_input_basis: Path,
    tiny_sources: tuple[str, ...],
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """A run of four steps with dropout, and its record."""
    output = tmp_path_factory.mktemp("runs") / "run"
    loha = output.parent / "loha.json"
    loha.write_text('{"peft_type": "LOHA", "r": 2, "alpha": 4}')
    settings = settings_of(request.param, tiny_basis, tiny_input_basis, loha, tiny_sources)
    common = {"max_steps": 4, "save_steps": 2, "dropout": 0.1, "warmup_ratio": 0.0}
    config = config_for(tiny_model, tiny_data, output, **{**common, **settings})
    return config, output, train(config)


def test_training_lowers_the_loss_and_trains_as_much_as_the_table_says(finished: Run) -> None:
    config, output, record = finished
    assert record["heldout"]["change"]["value"] < 0
    assert losses(output)[-1] < losses(output)[0]
    of_layer = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64)}
    shapes = {f"{layer}.{name}": shape for layer in range(2) for name, shape in of_layer.items()}
    plan = config.adapter_plan()
    assert plan is not None
    plan = METHODS[config.mode].for_model(plan, 4)
    counted = METHODS[config.mode].parameters(shapes, plan)
    if config.mode == "peft":
        counted = (
            2 * 2 * sum(map(sum, shapes.values()))
        )  # two pairs of factors of rank 2 in LoHa, of which the table knows nothing
    if config.mode == "increlora":  # an A, a B and an E for each of its ranks, which add up to four for each layer
        ranks = {name: ranks_of(output)[f"model.layers.{name.replace('.', '.self_attn.')}"] for name in shapes}
        assert sum(ranks.values()) == 4 * 6
        counted = sum(ranks[name] * (out + inside + 1) for name, (out, inside) in shapes.items())
    if config.mode == "eva":  # four for each layer on average, which the layers share out
        ranks = {name: ranks_of(output)[f"model.layers.{name.replace('.', '.self_attn.')}"] for name in shapes}
        assert sum(ranks.values()) == 4 * 6
        counted = sum(ranks[name] * (out + inside) for name, (out, inside) in shapes.items())
    assert record["parameters"]["trained"] == counted


def test_a_resumed_run_equals_an_uninterrupted_run(finished: Run, tmp_path: Path) -> None:
    config, output, _ = finished
    again = tmp_path / "run"
    shutil.copytree(output, again)
    for name in ("checkpoints/checkpoint-4", "adapter"):
        shutil.rmtree(again / name)
    record = record_of(again)
    (again / "run.json").write_text(json.dumps({**record, "status": "running"}))
    resumed = train(replace(config, output_dir=str(again), resume=True))
    assert resumed["resumed"] == 1
    assert log_lines(again) == log_lines(output)
    found, wanted = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (again, output))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_frozen_weights_do_not_change_in_training(finished: Run, tmp_path: Path) -> None:
    config, output, _ = finished
    if config.mode == "increlora":
        return  # nothing of it is frozen
    run, prepared = RunDirectory(tmp_path), prepare(config)
    start, *_ = assemble(
        config, prepared, training_arguments(config, prepared.hardware, len(prepared.train.examples), run), run
    )
    trained = {name for name, parameter in start.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    at_start = {name.replace(".default", ""): (name, tensor) for name, tensor in start.state_dict().items()}
    last = load_file(output / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors")
    last = {
        key: tensor
        for key, tensor in last.items()
        if not key.endswith((".earlier", ".used", ".mask", ".kept", "_sensitivity", "_uncertainty"))
    }  # set in training
    frozen = {key for key in last if at_start.get(key, at_start.get(f"{key}.weight"))[0] not in trained}
    assert all(torch.equal(last[key], at_start[key][1]) for key in frozen)
    assert len(last) - len(frozen) == 6 * (len(METHODS[config.mode].trained) or 4)
    moved = [not torch.equal(last[key], at_start.get(key, at_start.get(f"{key}.weight"))[1]) for key in set(last) - frozen]
    assert all(moved) or config.mode in ("xgblora", "adalora"), "which start links again and prune"


def test_plain_peft_reads_what_is_stored_and_merging_gives_the_same_model(finished: Run, tmp_path: Path) -> None:
    config, output, _ = finished
    ours = logits(load_adapter(base_of(config), resolve_model(str(output))))
    assert not torch.allclose(ours, logits(base_of(config)), atol=1e-3)
    if METHODS[config.mode].plain_peft_loads:
        assert torch.equal(logits(PeftModel.from_pretrained(base_of(config), str(output / "adapter")).eval()), ours)
    else:
        with pytest.raises((KeyError, ValueError), match=f"CORA_{config.mode}"):
            PeftModel.from_pretrained(base_of(config), str(output / "adapter"))
    assert merge_adapter(resolve_model(str(output)), tmp_path / "merged") == 6
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    assert torch.allclose(merged, ours, rtol=1e-4, atol=1e-4 * ours.abs().max())


def test_what_is_exported_is_a_plain_lora_of_the_same_effect(finished: Run, tmp_path: Path) -> None:
    config, output, _ = finished
    if METHODS[config.mode].lora_rank is None:
        with pytest.raises(CoraError, match="has no equivalent LoRA; `cora merge` writes it as a plain model"):
            export_adapter(resolve_model(str(output)), tmp_path / "exported")
        assert not list(tmp_path.iterdir())
        return
    ranks = {"r": 4, "as the file says": 4, "2r": 8, "n·r": 8, "q": 23, "M·r": 12}
    rank = ranks.get(str(METHODS[config.mode].lora_rank)) or max(ranks_of(output).values())
    assert export_adapter(resolve_model(str(output)), tmp_path / "exported") == rank
    exported = PeftModel.from_pretrained(base_of(config), str(tmp_path / "exported")).eval()
    assert exported.peft_config["default"].peft_type == "LORA"
    assert {path.suffix for path in (tmp_path / "exported").iterdir()} <= {".json", ".safetensors", ".md", ".txt"}
    assert not (tmp_path / "exported" / "cora.json").exists()
    ours = logits(load_adapter(base_of(config), resolve_model(str(output))))
    assert torch.allclose(logits(exported), ours, rtol=1e-4, atol=1e-4 * ours.abs().max())


def test_the_stored_adapter_has_the_held_out_loss_that_was_reported(finished: Run, tmp_path: Path) -> None:
    config, output, record = finished
    merge_adapter(resolve_model(str(output)), tmp_path / "merged")
    settings = {"max_steps": 1, "learning_rate": 1e-9, "test_size": 4.0}
    of_merged = train(config_for(tmp_path / "merged", Path(config.dataset), tmp_path / "run", **settings))
    assert of_merged["heldout"]["before"]["loss"] == pytest.approx(record["heldout"]["after"]["loss"], rel=1e-4)


def test_in_lora_plus_b_learns_at_the_ratios_rate(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Adam's first step moves every weight by its learning rate, and B alone has a gradient then."""
    moved = {}
    for ratio in (None, 4.0):
        output = tmp_path / str(ratio)
        train(
            config_for(
                tiny_model,
                tiny_data,
                output,
                mode="lora+",
                max_steps=1,
                learning_rate=1e-4,
                lora_plus_ratio=ratio,
                warmup_ratio=0.0,
            )
        )
        state = load_file(output / "adapter" / "adapter_model.safetensors")
        moved[ratio] = max(tensor.abs().max().item() for key, tensor in state.items() if ".lora_B." in key)
    assert moved == {None: pytest.approx(16e-4, rel=1e-3), 4.0: pytest.approx(4e-4, rel=1e-3)}


def test_the_file_of_pefts_method_is_recorded_by_its_absolute_path_and_may_move(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loha.json").write_text('{"peft_type": "LOHA", "r": 2, "alpha": 4}')
    monkeypatch.chdir(tmp_path)
    config = config_for(tiny_model, tiny_data, tmp_path / "run", mode="peft", peft_config="loha.json", dropout=0.0, max_steps=1)
    record = train(config)
    assert f"peft_config: {tmp_path}/loha.json" in (tmp_path / "run" / "config.yaml").read_text()
    # As earlier versions recorded it.
    record["fingerprint"]["settings"]["peft_config"] = "loha.json"
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    moved = (tmp_path / "loha.json").rename(tmp_path / "moved.json")
    assert train(replace(config, peft_config=str(moved), resume=True))["status"] == "finished"


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("q_proj", "down_proj")])
def test_ia3_without_feedforward_modules_is_stored_as_peft_reads_it(targets, tiny_model, tiny_data, tmp_path) -> None:
    # PEFT fills in down_proj for a Llama, and refuses it where it is no target.
    (tmp_path / "ia3.json").write_text('{"peft_type": "IA3"}')
    run, changes = tmp_path / "run", {"peft_config": str(tmp_path / "ia3.json"), "dropout": 0.0, "learning_rate": 0.3}
    train(config_for(tiny_model, tiny_data, run, mode="peft", target_modules=targets, max_steps=2, **changes))
    elsewhere = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), run / "adapter").eval()
    scaled = {name for name, layer in elsewhere.named_modules() if getattr(layer, "is_feedforward", False)}
    assert bool(scaled) == ("down_proj" in targets)
    base, adapter = AutoModelForCausalLM.from_pretrained(tiny_model), resolve_model(str(run / "adapter"))
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected, before = elsewhere(ids).logits, base.eval()(ids).logits
        torch.testing.assert_close(load_adapter(base, adapter)(ids).logits, expected)
        assert not torch.allclose(expected, before, atol=1e-2)
