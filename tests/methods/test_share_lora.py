"""ShareLoRA-A: one tensor per projection, whose gradient is the sum over layers; the tests of all methods run on it too."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from cora_cli.adapters.facts import AdapterFacts
from cora_cli.adapters.install import install_adapter
from cora_cli.adapters.loading import load_adapter
from cora_cli.adapters.storage import save_adapter
from cora_cli.methods.parts.layers import lora_layers
from cora_cli.methods.registry import METHODS
from cora_cli.models.references import resolve_model

from .helpers import plan_of

IDS = torch.tensor([[1, 5, 9, 100, 7, 3, 2, 40]])
SHAPES = {f"layers.{layer}.{name}": shape for layer in range(2) for name, shape in (("q_proj", (64, 64)), ("v_proj", (32, 64)))}
SETTINGS = {"rank": 4, "alpha": 8.0, "rslora": False, "target_modules": ("q_proj", "v_proj"), "dropout": 0.0, "seed": 3}


@pytest.fixture
def load(tiny_model):
    return lambda: LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def factors(wrapped, factor):
    return {name: getattr(layer, factor)["default"].weight for name, layer in lora_layers(wrapped)}


def test_all_layers_of_a_projection_hold_one_a_and_each_its_own_b(load):
    wrapped = install_adapter(load(), plan_of("sharelora-a", **SETTINGS), None)
    of_a, of_b = factors(wrapped, "lora_A"), factors(wrapped, "lora_B")
    assert len({id(weight) for weight in of_a.values()}) == 2
    assert len({id(weight) for weight in of_b.values()}) == 4
    for projection in ("q_proj", "v_proj"):
        assert len({id(weight) for name, weight in of_a.items() if name.endswith(projection)}) == 1


def test_the_count_is_that_of_the_model(load):
    plan = plan_of("sharelora-a", **SETTINGS)
    wrapped = install_adapter(load(), plan, None)
    trained = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    assert METHODS["sharelora-a"].parameters(SHAPES, plan) == trained == 4 * (64 + 64 + 2 * (64 + 32))


def test_the_gradient_of_a_is_the_sum_over_layers_of_a_lora_with_equal_factors(load):
    shared = install_adapter(load(), plan_of("sharelora-a", **SETTINGS), None)
    plain = install_adapter(load(), plan_of("lora", **SETTINGS), None)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in factors(shared, "lora_B").items():
            weight.copy_(torch.randn(weight.shape, generator=generator))
            factors(plain, "lora_B")[name].copy_(weight)
        for name, weight in factors(shared, "lora_A").items():
            factors(plain, "lora_A")[name].copy_(weight)
    for model in (shared, plain):
        model(IDS, labels=IDS).loss.backward()
    for name, weight in factors(shared, "lora_A").items():
        projection = name.rpartition(".")[2]
        own = [other.grad for key, other in factors(plain, "lora_A").items() if key.endswith(projection)]
        assert torch.allclose(weight.grad, sum(own), rtol=1e-4, atol=1e-7)


def test_an_adapter_that_is_loaded_for_training_shares_again(load, tiny_model, tmp_path):
    plan = plan_of("sharelora-a", **SETTINGS)
    wrapped = install_adapter(load(), plan, None)
    with torch.no_grad():
        for weight in factors(wrapped, "lora_B").values():
            weight.fill_(0.1)
    save_adapter(wrapped, tmp_path / "adapter", AdapterFacts(plan, str(tiny_model), None, "0" * 64, None, None, compact=False))
    again = factors(load_adapter(load(), resolve_model(str(tmp_path / "adapter")), trainable=True), "lora_A")
    assert len({id(weight) for weight in again.values()}) == 2
    assert all(torch.equal(weight, factors(wrapped, "lora_A")[name]) for name, weight in again.items())


@pytest.mark.parametrize("mode", ["sharelora-a", "sharelora-b", "sharelora-ab"])
def test_projections_of_one_name_in_two_places_of_a_block_share_nothing(mode):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    plan = plan_of(mode, **{**SETTINGS, "target_modules": ("c_proj",)})
    wrapped = install_adapter(model, plan, None)
    for factor in ("lora_A", "lora_B"):
        weights = factors(wrapped, factor)
        alone = 1 if factor in METHODS[mode].shared else 2
        assert len({id(weight) for weight in weights.values()}) == 2 * alone
    shapes = {
        f"transformer.h.{layer}.{place}.c_proj": (16, size) for layer in range(2) for place, size in (("attn", 16), ("mlp", 64))
    }
    trained = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    assert METHODS[mode].parameters(shapes, plan) == trained
