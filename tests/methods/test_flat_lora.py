"""The noise of Flat-LoRA: its size, where it is and when, and that W comes back."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from cora_cli.adapters.install import install_adapter
from cora_cli.errors import UsageError
from cora_cli.methods.method import Step
from cora_cli.methods.parts.layers import factors_of, lora_layers
from cora_cli.methods.registry import METHODS
from cora_cli.training.config import TrainConfig
from cora_cli.training.run import train
from tests.methods.helpers import plan_of
from tests.training.helpers import config_for, losses

METHOD = METHODS["flat-lora"]
COMMON = {"rank": 4, "alpha": 8.0, "rslora": False, "target_modules": ("q_proj", "v_proj"), "dropout": 0.0, "seed": 0}


def step(number: int, total: int = 10) -> Step:
    return Step(number, total, SimpleNamespace())  # type: ignore[arg-type]


def weights_of(wrapped) -> list[torch.Tensor]:
    return [layer.get_base_layer().weight.detach().clone() for _, layer in lora_layers(wrapped)]


@pytest.fixture
def wrapped(tiny_model: Path):
    made = install_adapter(LlamaForCausalLM.from_pretrained(tiny_model), plan_of("flat-lora", **COMMON), None)
    for _, layer in lora_layers(made):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return made


def test_each_row_has_noise_in_proportion_to_the_norm_of_the_adapted_weight(wrapped):
    made = plan_of("flat-lora", **COMMON, flat_sigma=0.1)
    before = weights_of(wrapped)
    ratios = []
    for number in range(1, 11):
        METHOD.before_step(wrapped, made, step(number))
        strength = 0.1 * (1 - math.cos(math.pi * number / 10)) / 2
        for w, noisy, (_, layer) in zip(before, weights_of(wrapped), lora_layers(wrapped), strict=True):
            a, b = (factor.double() for factor in factors_of(layer))
            norms = (w.double() + made.scaling * b @ a).norm(dim=1)
            ratios.append((noisy - w).double() / (strength * norms / 8)[:, None])  # 64 inputs
        METHOD.after_step(wrapped, made, step(number))
    drawn = torch.cat([ratio.flatten() for ratio in ratios])
    assert drawn.mean().item() == pytest.approx(0, abs=4 / math.sqrt(len(drawn)))
    assert drawn.square().mean().item() == pytest.approx(1, abs=4 * math.sqrt(2 / len(drawn)))


def test_the_noise_is_that_of_the_seed_the_step_and_the_layer_and_w_comes_back(wrapped):
    made = plan_of("flat-lora", **COMMON)
    before, seen = weights_of(wrapped), {}
    for number in (4, 4, 5):
        METHOD.before_step(wrapped, made, step(number))
        noise = [noisy - w for noisy, w in zip(weights_of(wrapped), before, strict=True)]
        assert all(one.any() for one in noise)
        assert not torch.equal(noise[0], noise[2])
        assert all(torch.equal(one, other) for one, other in zip(noise, seen.setdefault(number, noise), strict=True))
        METHOD.after_step(wrapped, made, step(number))
        assert all(torch.equal(one, other) for one, other in zip(weights_of(wrapped), before, strict=True))
    assert not torch.equal(seen[4][0], seen[5][0])


def test_the_gradients_are_those_at_the_weights_with_the_noise(wrapped, tiny_model):
    """Against plain LoRA on a model that has these weights from the start."""
    ids = torch.tensor([[1, 5, 9, 100, 7, 3, 2, 40]])
    METHOD.before_step(wrapped, plan_of("flat-lora", **COMMON), step(7))
    wrapped(ids, labels=ids).loss.backward()
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    for name, layer in lora_layers(wrapped):
        model.get_parameter(f"{name}.weight").data = layer.get_base_layer().weight.detach().clone()
    plain = install_adapter(model, plan_of("lora", **COMMON), None)
    for (_, ours), (_, theirs) in zip(lora_layers(wrapped), lora_layers(plain), strict=True):
        theirs.lora_B["default"].weight.data = ours.lora_B["default"].weight.detach().clone()
    plain(ids, labels=ids).loss.backward()
    for ours, theirs in zip(wrapped.parameters(), plain.parameters(), strict=True):
        if ours.requires_grad:
            assert torch.equal(ours.grad, theirs.grad)


def test_a_row_is_an_output_where_a_layer_stores_in_by_out():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=128, n_layer=1, n_head=2, vocab_size=32, n_positions=16))
    layer = base.transformer.h[0].attn.c_attn  # 128 inputs, 384 outputs
    layer.weight.data *= torch.linspace(0.1, 3, 384)
    before = layer.weight.detach().clone()
    made = plan_of("flat-lora", **{**COMMON, "target_modules": ("c_attn",)}, flat_sigma=1.0)
    wrapped = install_adapter(base, made, None)
    METHOD.before_step(wrapped, made, step(10))
    noise = next(layer for _, layer in lora_layers(wrapped)).get_base_layer().weight - before
    assert torch.allclose(noise.std(0), before.norm(dim=0) / math.sqrt(128), rtol=0.4)
    METHOD.after_step(wrapped, made, step(10))
    assert torch.equal(next(layer for _, layer in lora_layers(wrapped)).get_base_layer().weight, before)


def test_without_noise_it_is_lora_and_with_noise_the_stored_adapter_has_the_loss_of_the_run(tiny_model, tiny_data, tmp_path):
    settings = {"max_steps": 2, "warmup_ratio": 0.0, "eval_steps": 1}
    train(config_for(tiny_model, tiny_data, tmp_path / "lora", mode="lora", **settings))
    train(config_for(tiny_model, tiny_data, tmp_path / "still", mode="flat-lora", flat_sigma=0.0, **settings))
    train(config_for(tiny_model, tiny_data, tmp_path / "noisy", mode="flat-lora", **settings))
    lora, still, noisy = (
        load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("lora", "still", "noisy")
    )
    assert all(torch.equal(still[key], lora[key]) for key in lora)
    assert any(not torch.equal(noisy[key], lora[key]) for key in lora)
    assert losses(tmp_path / "still") == losses(tmp_path / "lora")
    assert losses(tmp_path / "noisy")[0] != losses(tmp_path / "lora")[0]


def test_what_makes_no_sense_is_refused():
    common = {"model": "m", "dataset": "d", "output_dir": "o"}
    for settings, said in (
        ({"mode": "flat-lora", "flat_sigma": -0.1}, "--flat-sigma must be at least 0, not -0.1"),
        ({"mode": "lora", "flat_sigma": 0.1}, "--flat-sigma does not apply to mode lora"),
        ({"mode": "flat-lora", "load_in_4bit": True}, "does not apply to mode flat-lora, which needs the weights themselves"),
    ):
        with pytest.raises(UsageError, match=said):
            TrainConfig(**common, **settings)
