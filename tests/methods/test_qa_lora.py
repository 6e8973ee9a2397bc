"""QA-LoRA, checked against the pooled forward pass in float64; the tests of all methods run on it too."""

import math

import pytest
import torch
from transformers import LlamaForCausalLM

from cora_cli.adapters.install import install_adapter
from cora_cli.errors import CoraError, UsageError
from cora_cli.methods.parts.layers import factors_of, lora_layers
from cora_cli.methods.registry import METHODS
from cora_cli.training.config import TrainConfig

from .helpers import first_adam_step, plan_of

SETTINGS = {"rank": 4, "alpha": 12.0, "rslora": False, "target_modules": ("q_proj", "v_proj"), "dropout": 0.0, "seed": 3}


@pytest.fixture
def load(tiny_model):
    return lambda: LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def layers_of(model, **changes):
    return dict(lora_layers(install_adapter(model, plan_of("qa-lora", **{**SETTINGS, **changes}), None)))


def test_a_starts_as_xavier_uniform_on_the_groups(load):
    for layer in layers_of(load(), group_size=4).values():
        columns, b = layer.lora_A["default"].columns, layer.lora_B["default"].weight
        assert (columns.shape, b.shape) == ((4, 16), (layer.out_features, 4))
        assert not b.any()
        bound = math.sqrt(6 / (4 + 16))
        assert 0.9 * bound < columns.abs().max() <= bound


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_the_layer_pools_its_inputs_and_its_change_is_the_expanded_product(pooling, load):
    for layer in layers_of(load(), group_size=4, pooling=pooling).values():
        columns, b = layer.lora_A["default"].columns, torch.nn.init.normal_(layer.lora_B["default"].weight)
        x = torch.randn(2, 5, 64)
        pooled = torch.nn.functional.avg_pool1d(x.double(), 4) * (1 if pooling == "mean" else 4)
        with torch.no_grad():
            found = layer(x) - layer.base_layer(x)
        wanted = 3.0 * pooled @ columns.detach().double().T @ b.detach().double().T
        assert torch.allclose(found.double(), wanted, rtol=1e-3, atol=1e-4)
        product = b.detach().double() @ columns.detach().double()
        change = (0.25 if pooling == "mean" else 1.0) * 3.0 * product.repeat_interleave(4, dim=1)
        assert torch.allclose(layer.get_delta_weight("default").double(), change, atol=1e-5)


def test_the_change_folds_into_the_zero_points_of_a_base_in_groups(load):
    """zeros −= c·s·(B·A)ᵀ / scales, as merge.py of yuhuixu1993/qa-lora: the merged weight keeps its integers and scales."""
    for layer in layers_of(load(), group_size=4).values():
        b = torch.nn.init.normal_(layer.lora_B["default"].weight).detach().double()
        grouped = layer.base_layer.weight.detach().double().unflatten(1, (16, 4))
        low, high = grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True)
        scales, zeros = (high - low) / 15, -low * 15 / (high - low)
        integers = (grouped / scales + zeros).round()
        product = b @ layer.lora_A["default"].columns.detach().double()
        folded = zeros - 3.0 / 4 * product[..., None] / scales
        merged = (scales * (integers - folded)).flatten(1)
        wanted = (scales * (integers - zeros)).flatten(1) + layer.get_delta_weight("default").double()
        assert torch.allclose(merged, wanted, atol=1e-5)


def test_the_first_adam_step_moves_b_against_the_gradient_through_the_pooled_a(load):
    for layer in layers_of(load(), group_size=4).values():
        a = factors_of(layer)[0].double()
        found, gradient = first_adam_step(layer, rate=0.01)
        expected = 3.0 * -0.01 * (gradient @ a.T).sign() @ a
        assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max())


def test_the_count_is_smaller_on_the_side_of_the_inputs(load):
    made = plan_of("qa-lora", **SETTINGS, group_size=4)
    wrapped = install_adapter(load(), made, None)
    trained = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    shapes = {f"{layer}.{name}": shape for layer in range(2) for name, shape in (("q", (64, 64)), ("v", (32, 64)))}
    assert METHODS["qa-lora"].parameters(shapes, made) == trained == 2 * 4 * (16 + 64 + 16 + 32)


def test_without_settings_it_is_the_authors_code():
    assert plan_of("qa-lora", **SETTINGS).own == {"group_size": 32, "pooling": "mean"}


def test_a_group_size_that_does_not_divide_the_inputs_is_refused_before_the_model_is_touched(load):
    model = load()
    with pytest.raises(
        CoraError, match=r"mode qa-lora needs --group-size to divide the 64 inputs of .*q_proj, which 24 does not"
    ):
        layers_of(model, group_size=24)
    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"group_size": 0}, "--group-size must be at least 1, not 0"),
        ({"mode": "lora", "group_size": 4}, "--group-size does not apply to mode lora"),
        ({"mode": "lora", "pooling": "mean"}, "--pooling does not apply to mode lora"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        TrainConfig(**{"mode": "qa-lora", "model": "m", "dataset": "d", "output_dir": "o", **settings})


def test_the_start_is_known_to_an_inspection(load):
    made = plan_of("qa-lora", **SETTINGS)
    for name, layer in layers_of(load()).items():
        assert torch.equal(METHODS["qa-lora"].start_directions(made, None, name, 64, "input"), factors_of(layer)[0].T)
