"""--start mean-delta below every mode that takes it: the same training as on W + mean, stored as an adapter on W; and the way for the others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from cora_cli.adapters.export import export_adapter
from cora_cli.adapters.facts import read_facts
from cora_cli.adapters.loading import load_adapter
from cora_cli.adapters.merge import merge_adapter
from cora_cli.adapters.posterior import drawn_models
from cora_cli.errors import UsageError
from cora_cli.methods.registry import METHODS
from cora_cli.models.references import resolve_model
from cora_cli.training.config import TrainConfig
from cora_cli.training.preflight import Measured, preflight
from cora_cli.training.run import train

from .helpers import config_for, losses, settings_of

IDS = torch.tensor([[1, 5, 9, 100, 7, 3, 2, 40]])
TAKING = [mode for mode, method in METHODS.items() if method.takes_mean_start and mode != "mean-delta"]
OTHERS = ["dora", "hira", "mora-6", "peft", "randlora", "vera", "full"]
QUICK = ("pissa", "vera")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def base(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def mean(
    tiny_model: Path, tiny_data: Path, tiny_sources: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, float]:
    """W + mean as a complete model, and its held-out loss."""
    place = tmp_path_factory.mktemp("mean")
    record = train(config_for(tiny_model, tiny_data, place / "run", mode="mean-delta", start_models=tiny_sources))
    merge_adapter(resolve_model(str(place / "run")), place / "merged")
    return place / "merged", record["heldout"]["after"]["loss"]


def settings_for(mode: Any, place: Path, basis: Path, input_basis: Path, sources: tuple[str, ...]) -> dict[str, Any]:
    loha = place / "loha.json"
    loha.write_text('{"peft_type": "LOHA", "r": 2, "alpha": 4}')
    found = settings_of(mode, basis, input_basis, loha, sources)
    if mode in ("fb", "tb"):
        found |= {"basis": None, "b_init": "gradient", "start_examples": 5}
    return {**found, "max_steps": 4 if mode in ("cola", "increlora") else 2, "warmup_ratio": 0.0}


def test_all_modes_but_those_that_are_no_lora_take_the_mean() -> None:
    assert {*TAKING, *OTHERS, "mean-delta"} == {*METHODS}


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=() if mode in QUICK else pytest.mark.slow) for mode in TAKING])
def test_training_below_the_mean_is_training_on_w_plus_the_mean_and_is_stored_on_w(
    mode: Any,
    mean: tuple[Path, float],
    tiny_model: Path,
    tiny_data: Path,
    tiny_basis: Path,
    tiny_input_basis: Path,
    tiny_sources: tuple[str, ...],
    tmp_path: Path,
) -> None:
    settings = settings_for(mode, tmp_path, tiny_basis, tiny_input_basis, tiny_sources)
    with_mean = {**settings, "start": "mean-delta", "start_models": tiny_sources}
    output = tmp_path / "run"
    config = config_for(tiny_model, tiny_data, output, **with_mean)
    plan = preflight(config)
    record = train(config)
    if mode not in ("dylora", "eigenlorax", "increlora", "lora-rite", "uni-lora", "xgblora"):
        # Those choose by values what they compute.
        assert isinstance(plan.measured, Measured)
        assert plan.measured.memory.total > 0
    facts = read_facts(output / "adapter")
    assert facts is not None
    assert facts.plan.own["start"] == record["plan"]["start"] == "mean-delta"
    if mode not in ("eigenlorax", "fa-basis"):  # whose sources or basis belong to W
        on_mean = train(config_for(mean[0], tiny_data, tmp_path / "on-mean", **settings))
        # After lori's first step, entries of B are equally large up to rounding, which decides about those that it keeps.
        error = 1e-3 if mode == "lori" else 1e-4
        assert losses(output) == pytest.approx(losses(tmp_path / "on-mean"), rel=error)
        for when in ("before", "after"):
            assert record["heldout"][when]["loss"] == pytest.approx(on_mean["heldout"][when]["loss"], rel=error)
    if METHODS[mode].step_0_is_base in ("yes", "up to rounding"):
        assert record["heldout"]["before"]["loss"] == pytest.approx(mean[1], rel=1e-5)
    ours = logits(load_adapter(base(tiny_model), resolve_model(str(output))))
    assert torch.equal(logits(PeftModel.from_pretrained(base(tiny_model), str(output / "adapter")).eval()), ours)
    merge_adapter(resolve_model(str(output)), tmp_path / "merged")
    assert torch.allclose(logits(base(tmp_path / "merged")), ours, atol=1e-4 * ours.abs().max())
    export_adapter(resolve_model(str(output)), tmp_path / "exported")
    exported = PeftModel.from_pretrained(base(tiny_model), str(tmp_path / "exported")).eval()
    assert torch.allclose(logits(exported), ours, atol=1e-4 * ours.abs().max())
    again = train(config_for(tmp_path / "merged", tiny_data, tmp_path / "again", max_steps=1, learning_rate=1e-9))
    assert again["heldout"]["before"]["loss"] == pytest.approx(record["heldout"]["after"]["loss"], rel=1e-4)


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=() if mode in QUICK else pytest.mark.slow) for mode in OTHERS])
def test_a_mode_that_is_no_lora_is_trained_on_the_merged_mean(
    mode: Any,
    mean: tuple[Path, float],
    tiny_model: Path,
    tiny_data: Path,
    tiny_basis: Path,
    tiny_input_basis: Path,
    tiny_sources: tuple[str, ...],
    tmp_path: Path,
) -> None:
    settings = settings_for(mode, tmp_path, tiny_basis, tiny_input_basis, tiny_sources)
    refusal = (
        "applies to adapters, not to mode full" if mode == "full" else f"mode {mode} is stored as .*`cora merge` of that run"
    )
    with pytest.raises(UsageError, match=refusal):
        config_for(tiny_model, tiny_data, tmp_path / "refused", **settings, start="mean-delta", start_models=tiny_sources)
    output = tmp_path / "run"
    record = train(config_for(mean[0], tiny_data, output, **settings))
    assert record["heldout"]["before"]["loss"] == pytest.approx(mean[1], rel=1e-5)
    if mode == "full":
        assert not torch.equal(logits(base(output / "model")), logits(base(mean[0])))
        return
    ours = logits(load_adapter(base(mean[0]), resolve_model(str(output))))
    merge_adapter(resolve_model(str(output)), tmp_path / "merged")
    assert torch.allclose(logits(base(tmp_path / "merged")), ours, atol=1e-4 * ours.abs().max())


def test_a_lower_rank_of_dylora_keeps_the_mean(
    tiny_model: Path, tiny_data: Path, tiny_sources: tuple[str, ...], tmp_path: Path
) -> None:
    settings = {"mode": "dylora", "start": "mean-delta", "start_models": tiny_sources, "max_steps": 2}
    train(config_for(tiny_model, tiny_data, tmp_path / "run", **settings))
    adapter = resolve_model(str(tmp_path / "run"))
    assert export_adapter(adapter, tmp_path / "exported", rank=2) == 2 + 8
    cut = load_adapter(base(tiny_model), adapter, rank=2)
    exported = PeftModel.from_pretrained(base(tiny_model), str(tmp_path / "exported")).eval()
    assert torch.allclose(logits(exported), logits(cut), atol=1e-5)
    complete = load_adapter(base(tiny_model), adapter)
    for name, layer in complete.named_modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            s = layer.scaling["default"]
            expected = s * b[:, 4:] @ a[4:] + 2 * s * b[:, :2] @ a[:2]  # alpha / 2 instead of alpha / 4
            found = cut.get_submodule(name).get_delta_weight("default")
            assert torch.allclose(found, expected, atol=1e-6)


def test_the_mean_has_no_distribution_in_draws_of_scalabl(
    tiny_model: Path, tiny_data: Path, tiny_sources: tuple[str, ...], tmp_path: Path
) -> None:
    settings = {"mode": "scalabl", "start": "mean-delta", "start_models": tiny_sources, "max_steps": 2}
    train(config_for(tiny_model, tiny_data, tmp_path / "run", **settings))
    adapter = resolve_model(str(tmp_path / "run"))
    model = load_adapter(base(tiny_model), adapter)
    (drawn,) = drawn_models(model.get_base_model(), adapter, 1)
    for name, layer in drawn.named_modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            moved = layer.lora_A["default"].weight - model.get_base_model().get_submodule(name).lora_A["default"].weight
            assert moved[:4].abs().max() > 0
            assert not moved[4:].any()


def test_the_mean_alone_is_that_start_already() -> None:
    with pytest.raises(UsageError, match="mode mean-delta is that start already; leave out --start mean-delta"):
        TrainConfig(model="m", dataset="d", output_dir="o", mode="mean-delta", start="mean-delta", start_models=("a",))
