"""Adam's first step from a start that is the method's own, against the formula in float64. Other methods have theirs in their own files."""

import pytest
import torch
from transformers import LlamaForCausalLM

from cora_cli.adapters.install import install_adapter
from cora_cli.methods.parts.layers import factors_of, lora_layers
from cora_cli.methods.registry import METHODS

from .helpers import first_adam_step, observed_in, plan_of

RATE = 0.01
SETTINGS = {"rank": 4, "alpha": 12.0, "rslora": False, "target_modules": ("q_proj", "v_proj"), "dropout": 0.0, "seed": 3}


@pytest.fixture
def load(tiny_model):
    return lambda: LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.mark.parametrize("mode", ["lora-one", "lora-ga", "corda", "eva", "lori", "lora-fa", "rslora"])
def test_the_first_step_moves_a_and_b_against_the_signs_of_their_gradients(mode, load):
    model, plan = load(), plan_of(mode, **SETTINGS)
    for _, layer in lora_layers(install_adapter(model, plan, None, observed_in(model, plan))):
        a, b = (factor.detach().double() for factor in factors_of(layer))
        s = layer.scaling["default"]
        assert s == pytest.approx(12 / 4**0.5 if mode in ("lora-one", "rslora") else 12 / 4)
        found, gradient = first_adam_step(layer, RATE)
        moved_b = b - RATE * (s * gradient @ a.T).sign()
        moved_a = a if METHODS[mode].freezes("lora_A") else a - RATE * (s * b.T @ gradient).sign()
        expected = s * moved_b @ moved_a
        assert torch.allclose(found, expected.detach(), atol=1e-5)
        assert not torch.allclose(found, s * b @ a, atol=1e-3)


@pytest.mark.parametrize("mode", ["sharelora-a", "sharelora-b", "sharelora-ab"])
def test_the_first_step_of_shared_factors_is_along_the_sum_over_layers(mode, load):
    wrapped, shared = install_adapter(load(), plan_of(mode, **SETTINGS), None), mode.removeprefix("sharelora-")
    generator = torch.Generator().manual_seed(1)
    layers = dict(lora_layers(wrapped))
    parameters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    assert len({id(parameter) for parameter in parameters}) == {"a": 2 + 4, "b": 4 + 2, "ab": 2 + 2}[shared]
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    starts = {name: [factor.detach().double() for factor in factors_of(layer)] for name, layer in layers.items()}
    loss, gradients = torch.zeros(()), {}
    for name, layer in layers.items():
        x, pull = (torch.randn(9, width, generator=generator) for width in (layer.in_features, layer.out_features))
        loss = loss + ((layer(x) - layer.base_layer(x)) * pull).sum()
        gradients[name] = pull.double().T @ x.double()
    loss.backward()
    torch.optim.Adam(parameters, lr=RATE, eps=1e-30).step()
    s = 3.0
    of_a = {name: s * b.T @ gradients[name] for name, (_, b) in starts.items()}
    of_b = {name: s * gradients[name] @ a.T for name, (a, _) in starts.items()}
    for name, layer in layers.items():
        same = [other for other in layers if other.endswith(name.rpartition(".")[2])]
        assert len(same) == 2
        a, b = starts[name]
        moved_a = a - RATE * sum(of_a[other] for other in (same if "a" in shared else [name])).sign()
        moved_b = b - RATE * sum(of_b[other] for other in (same if "b" in shared else [name])).sign()
        found = layer.get_delta_weight("default").detach().double()
        assert torch.allclose(found, s * moved_b @ moved_a, atol=1e-4)
