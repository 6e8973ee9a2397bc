"""Adapters on a base held in NF4: it equals its dequantised weights, stays as it is, and trains as any other base does."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cora_cli.adapters.install import install_adapter
from cora_cli.adapters.loading import load_adapter
from cora_cli.adapters.merge import merge_adapter
from cora_cli.device import planned_hardware
from cora_cli.errors import CoraError
from cora_cli.methods.parts.layers import adapted_layers
from cora_cli.methods.registry import METHODS, Mode
from cora_cli.models.configuration import load_configuration
from cora_cli.models.loading import load_model
from cora_cli.models.references import resolve_model
from cora_cli.planning.four_bit import hold_in_four_bit
from cora_cli.planning.memory import StorageMeter, fake_model, fakes
from cora_cli.planning.page import USABLE
from cora_cli.training import fitting
from cora_cli.training.preflight import Measured, preflight
from cora_cli.training.prepare import prepare
from cora_cli.training.rough import rough_peak
from cora_cli.training.run import train
from tests.conftest import VOCABULARY, make_model
from tests.methods.helpers import plan_of

from .helpers import KILLED, RunProcess, config_for, log_lines, losses, real_peak, record_of, run_together

bitsandbytes = pytest.importorskip("bitsandbytes")

IDS = torch.tensor([[1, 5, 9, 100, 7, 3, 2, 40]])
PLAN = {"rank": 4, "alpha": 8.0, "rslora": False, "target_modules": ("q_proj", "k_proj"), "dropout": 0.0, "seed": 0}
TRAINED_ON_FOUR_BIT: list[Mode] = [
    *("lora", "melora", "mora-6", "prolora", "lorta", "qa-lora", "lora-mini", "dora"),
    *("clora", "cola", "dylora", "lora-rite"),
]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the one of all tests, with widths that are multiples of the blocks of 64 numbers."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny", seed=0, intermediate=128)


def load(model: Path, four_bit: bool = True) -> Any:
    return load_model(resolve_model(str(model)), torch.float32, torch.device("cpu"), None, four_bit=four_bit)


def dequantised(layer: Any) -> torch.Tensor:
    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def packed(model: Any) -> dict[str, torch.Tensor]:
    return {
        name.removesuffix(".base_layer"): module.weight.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }


@torch.no_grad()
def test_the_linear_layers_are_nf4_with_double_quantisation_and_multiply_by_the_dequantised_weight(tiny_model: Path) -> None:
    model, plain = load(tiny_model), load(tiny_model, four_bit=False)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert len(layers) == 2 * 7
    for name, layer in layers.items():
        state, stored = layer.weight.quant_state, plain.get_submodule(name).weight
        assert (state.quant_type, state.nested, layer.weight.dtype) == ("nf4", True, torch.uint8)
        weight = dequantised(layer)
        x = torch.randn(3, layer.in_features)
        assert torch.allclose(layer(x), x @ weight.T, rtol=1e-4, atol=1e-4)
        assert 0 < (weight - stored).norm() / stored.norm() < 0.15


@pytest.mark.parametrize("mode", [mode for mode in TRAINED_ON_FOUR_BIT if mode != "dora"])
def test_step_0_is_the_quantised_base_and_a_step_moves_the_adapter_alone(mode: Mode, tiny_model: Path) -> None:
    model = load(tiny_model)
    with torch.no_grad():
        base, before = model(IDS).logits, packed(model)
    wrapped = install_adapter(model, METHODS[mode].for_model(plan_of(mode, **PLAN), 4), None)
    with torch.no_grad():
        assert torch.equal(wrapped(IDS).logits, base)
    optimizer = torch.optim.Adam([parameter for parameter in wrapped.parameters() if parameter.requires_grad], lr=0.1)
    wrapped(IDS, labels=IDS).loss.backward()
    optimizer.step()
    after = packed(wrapped.get_base_model())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    with torch.no_grad():
        assert not torch.allclose(wrapped(IDS).logits, base, atol=1e-3)
        # The layer is the dequantised weight and the adapter's own change.
        for _, layer in adapted_layers(wrapped):
            x = torch.randn(3, layer.in_features)
            change = layer.get_delta_weight("default")
            assert torch.allclose(layer(x), x @ (dequantised(layer.get_base_layer()) + change).T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_without_gradients_leaves_the_weights_and_the_gradients_of_later_ones_alone(
    dtype: torch.dtype, tiny_model: Path
) -> None:
    """bitsandbytes repacks the weights of a layer in such a pass where the processor has bfloat16 instructions."""

    def gradients(evaluated: bool) -> dict[str, torch.Tensor]:
        model = load_model(resolve_model(str(tiny_model)), dtype, torch.device("cpu"), None, four_bit=True)
        wrapped = install_adapter(model, METHODS["lora"].for_model(plan_of("lora", **PLAN), 4), None)
        if evaluated:
            before = packed(wrapped.get_base_model())
            with torch.no_grad():
                wrapped.eval()(IDS)
            after = packed(wrapped.get_base_model())
            assert all(torch.equal(after[name], before[name]) for name in before)
        wrapped.train()(IDS, labels=IDS).loss.backward()
        return {name: one.grad for name, one in wrapped.named_parameters() if one.grad is not None}

    fresh, later = gradients(False), gradients(True)
    assert any(gradient.any() for gradient in fresh.values())
    assert all(torch.equal(fresh[name], later[name]) for name in fresh)


def test_a_width_that_comes_back_with_other_scales_is_refused_by_a_plan_too(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "odd", seed=0)
    right = bitsandbytes.functional.dequantize_4bit
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda *given: 1.3 * right(*given))
    said = "cannot hold model.layers.0.mlp.down_proj in 4 bits on a processor: its 96 inputs are no multiple of 64"
    with pytest.raises(CoraError, match=said):
        load(model)
    with pytest.raises(CoraError, match=said):
        preflight(config_for(model, tiny_data, tmp_path / "run", load_in_4bit=True))


@pytest.fixture(
    scope="module",
    params=[pytest.param(mode, marks=() if mode == "lora" else pytest.mark.slow) for mode in TRAINED_ON_FOUR_BIT],
)
def finished(
    request: pytest.FixtureRequest, tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    output = tmp_path_factory.mktemp("runs") / "run"
    settings: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "dropout": 0.1, "warmup_ratio": 0.0, "load_in_4bit": True}
    config = config_for(tiny_model, tiny_data, output, mode=request.param, **settings)
    return config, output, train(config)


def test_a_method_of_peft_that_reads_the_weights_is_refused_by_its_name(
    tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    file = tmp_path / "loha.json"
    file.write_text(json.dumps({"peft_type": "LOHA", "r": 4}))
    config = config_for(tiny_model, tiny_data, tmp_path / "run", mode="peft", peft_config=str(file), load_in_4bit=True)
    with pytest.raises(
        CoraError, match="--load-in-4bit does not go with LOHA of --peft-config, which needs the weights themselves"
    ):
        prepare(config)


_OPTIONS: dict[str, dict[str, Any]] = {
    "FOURIERFT": {"n_frequency": 50},
    "VBLORA": {"vector_length": 32, "num_vectors": 8, "topk": 2},
    "WAVEFT": {"n_frequency": 40},
    "OFT": {"oft_block_size": 16, "r": 0},
    "ROAD": {"group_size": 16},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING))
def test_each_method_of_peft_trains_on_four_bits_or_is_refused(
    kind: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "peft.json").write_text(json.dumps({"peft_type": kind, **_OPTIONS.get(kind, {})}))
    settings: dict[str, Any] = {"mode": "peft", "peft_config": str(tmp_path / "peft.json"), "load_in_4bit": True}
    outcome = _outcome(tiny_model, tiny_data, tmp_path / "run", max_steps=1, **settings)
    assert outcome == "finished" or ("--peft-config" in outcome and not (tmp_path / "run").exists())


def _outcome(*paths: Path, **settings: Any) -> str:
    """The status of a run, or why it is refused."""
    try:
        return str(train(config_for(*paths, **settings))["status"])
    except CoraError as error:
        return str(error)


def test_a_run_learns_and_its_record_counts_all_numbers_of_the_base(finished: Any, tiny_model: Path) -> None:
    _, output, record = finished
    assert record["heldout"]["change"]["value"] < 0
    assert losses(output)[-1] < losses(output)[0]
    counts = record["parameters"]
    assert counts["total"] - counts["adapter"] == sum(p.numel() for p in load(tiny_model, four_bit=False).parameters())
    assert record["versions"]["bitsandbytes"] == bitsandbytes.__version__


def test_a_resumed_run_equals_an_uninterrupted_run(finished: Any, tmp_path: Path) -> None:
    config, output, _ = finished
    again = tmp_path / "run"
    shutil.copytree(output, again)
    for name in ("checkpoints/checkpoint-4", "adapter"):
        shutil.rmtree(again / name)
    (again / "run.json").write_text(json.dumps({**record_of(again), "status": "running"}))
    assert train(replace(config, output_dir=str(again), resume=True))["resumed"] == 1
    assert log_lines(again) == log_lines(output)
    found, wanted = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (again, output))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.slow
@pytest.mark.parametrize("mode", TRAINED_ON_FOUR_BIT)
def test_a_killed_run_resumes_to_the_same_bits(mode: Mode, tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 8, "batch_size": 4, "save_steps": 3, "dropout": 0.1, "load_in_4bit": True}
    expected = config_for(tiny_model, tiny_data, tmp_path / "expected", mode=mode, **settings)
    train(expected)
    config = replace(expected, output_dir=str(tmp_path / "run"))
    assert RunProcess(config, kill_at=("cora_cli.training.trainer.append_line", 6)).wait() == (KILLED, "")
    train(replace(config, resume=True))
    assert log_lines(tmp_path / "run") == log_lines(tmp_path / "expected")
    assert record_of(tmp_path / "run")["heldout"] == record_of(tmp_path / "expected")["heldout"]
    found, wanted = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("run", "expected"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@torch.no_grad()
def test_the_adapter_is_one_for_the_stored_weights_too_and_merges_into_them(
    finished: Any, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, output, _ = finished
    ours = load_adapter(load(tiny_model, four_bit=False), resolve_model(str(output)))(IDS).logits
    if METHODS[config.mode].plain_peft_loads:
        plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        assert torch.equal(PeftModel.from_pretrained(plain, str(output / "adapter")).eval()(IDS).logits, ours)
    merge_adapter(resolve_model(str(output)), tmp_path / "merged")
    assert (
        "was trained on its base in 4 bits (--load-in-4bit), and is put on the base's stored weights" in capsys.readouterr().err
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(IDS).logits
    assert torch.allclose(merged, ours, rtol=1e-4, atol=1e-4 * ours.abs().max())


@pytest.mark.slow
def test_two_processes_are_one(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "batch_size": 4, "learning_rate": 3e-3, "load_in_4bit": True}
    one = config_for(tiny_model, tiny_data, tmp_path / "one", **settings)
    train(one)
    assert run_together(replace(one, output_dir=str(tmp_path / "two"), batch_size=2)) == [(0, ""), (0, "")]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert all(map(math.isfinite, losses(tmp_path / "one")))


def quantised_bytes(model: Any) -> int:
    """Bytes of the storages of a loaded model, with the scales that bitsandbytes keeps next to its weights."""
    tensors = [*model.parameters(), *model.buffers()]
    for layer in (module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)):
        state = layer.weight.quant_state
        tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_the_planned_peak_is_that_of_the_real_training(
    dtype: str, tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "run", load_in_4bit=True, dtype=dtype, max_steps=2, eval_limit=1)
    found = preflight(config).measured
    assert isinstance(found, Measured), found
    loaded = load_model(
        resolve_model(str(tiny_model)),
        getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}[dtype]),
        torch.device("cpu"),
        None,
        four_bit=True,
    )
    # The real layers share one table of the scales' levels, 1 KiB.
    layers = sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in loaded.modules())
    assert 0 <= found.memory.parts["weights"] - quantised_bytes(loaded) <= layers * 1024
    prepared = prepare(config, planned=planned_hardware("cpu", dtype))
    rough = rough_peak(config, prepared)
    assert 0.5 < rough / found.memory.total < 2
    assert rough < rough_peak(replace(config, load_in_4bit=False), prepared)
    parameters = sum(parameter.untyped_storage().nbytes() for parameter in loaded.parameters())
    scales = quantised_bytes(loaded) - parameters - sum(buffer.nbytes for buffer in loaded.buffers())
    peak = real_peak(config, VOCABULARY, monkeypatch)
    assert found.memory.total == pytest.approx(sum(peak.values()) + scales, rel=0.1)
    assert found.parameters == record_of(tmp_path / "run")["parameters"]


def test_a_planned_layer_has_its_weight_while_it_multiplies_and_keeps_it_nowhere(tiny_model: Path) -> None:
    with fakes():
        model = fake_model(load_configuration(resolve_model(str(tiny_model))), False, torch.bfloat16)
        hold_in_four_bit(model, torch.bfloat16)
        layer = model.model.layers[0].mlp.up_proj  # 128 x 64
        with StorageMeter(VOCABULARY) as meter:
            states = torch.empty(3, 64, dtype=torch.bfloat16, requires_grad=True)
            product = layer(states)
            assert meter.peak["activations"] == 2 * (3 * 64 + 128 * 64 + 3 * 128)
            meter.restart()
            assert sum(meter.peak.values()) == 2 * (3 * 64 + 3 * 128)
            (gradient,) = torch.autograd.grad(product, states, torch.empty_like(product))
            assert gradient.shape == (3, 64)
            # With its 128 scales, before the gradient exists.
            assert meter.peak["activations"] == 2 * (3 * 64 + 2 * 3 * 128 + 128 * 64) + 4 * 128
        assert not isinstance(model.lm_head, bitsandbytes.nn.Linear4bit)


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=() if mode == "dora" else pytest.mark.slow) for mode in TRAINED_ON_FOUR_BIT]
)
def test_every_method_that_has_a_plan_has_one_on_four_bits(
    mode: Mode, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """The plans of two methods depend on numbers, whatever holds the base."""
    plain, four_bit = (
        preflight(config_for(tiny_model, tiny_data, tmp_path / "run", load_in_4bit=held, mode=mode)).measured
        for held in (False, True)
    )
    assert isinstance(four_bit, Measured) == isinstance(plain, Measured) == (mode not in ("dylora", "lora-rite"))
    if isinstance(four_bit, Measured) and isinstance(plain, Measured):
        assert four_bit.parameters == plain.parameters
        assert four_bit.memory.parts["adapter"] == plain.memory.parts["adapter"]


@pytest.mark.slow
def test_rows_that_do_not_fit_the_gpu_are_split_before_the_run(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tiny_model, tiny_data, tmp_path / "run", load_in_4bit=True, batch_size=16, device="cuda", dtype="bf16")
    prepared = prepare(config, planned=planned_hardware("cuda", "bf16"))
    needed = fitting.plan_run(config, prepared).measured
    assert isinstance(needed, Measured), needed
    monkeypatch.setattr(fitting, "_capacity", lambda device: needed.memory.total * 0.8 / USABLE)
    fitted = fitting.fit_rows(config, prepared)
    assert fitted.tokens_per_row is not None
    found = fitting.plan_run(fitted, prepared).measured
    assert isinstance(found, Measured)
    assert found.memory.total <= needed.memory.total * 0.8
