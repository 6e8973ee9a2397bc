"""MELoRA: block-diagonal factors, checked against the sum over mini LoRAs in float64; the tests of all methods run on it too."""

import pytest
import torch
from transformers import LlamaForCausalLM

from cora_cli.adapters.install import install_adapter
from cora_cli.errors import CoraError, UsageError
from cora_cli.methods.parts.layers import factors_of, lora_layers
from cora_cli.methods.registry import METHODS
from cora_cli.training.config import TrainConfig

from .helpers import first_adam_step, plan_of

SETTINGS = {"rank": 3, "alpha": 12.0, "rslora": False, "target_modules": ("q_proj", "v_proj"), "dropout": 0.0, "seed": 3}


@pytest.fixture
def load(tiny_model):
    return lambda: LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def layers_of(model, **settings):
    return dict(lora_layers(install_adapter(model, plan_of("melora", **{**SETTINGS, **settings}), None)))


def test_each_block_starts_as_a_lora_of_its_slice(load):
    for layer in layers_of(load(), mini_loras=4).values():
        a, b = layer.lora_A["default"].blocks, layer.lora_B["default"].blocks
        assert (a.shape, b.shape) == ((4, 3, 16), (4, layer.out_features // 4, 3))
        assert not b.any()
        assert 0.9 / 4 < a.abs().max() <= 1 / 4  # U(±√(n / in))
        assert layer.scaling["default"] == 4.0


def test_the_change_is_block_diagonal_has_rank_n_r_and_is_what_the_mini_loras_compute(load):
    for layer in layers_of(load(), mini_loras=4).values():
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        torch.nn.init.normal_(b.blocks)
        x = torch.randn(2, 5, 64)
        with torch.no_grad():
            found = layer(x) - layer.base_layer(x)
        height = layer.out_features // 4
        theirs = [
            4.0 * x[..., 16 * k : 16 * (k + 1)].double() @ a.blocks[k].double().T @ b.blocks[k].double().T for k in range(4)
        ]
        assert torch.allclose(found.double(), torch.cat(theirs, dim=-1), rtol=1e-4, atol=1e-4)
        change = layer.get_delta_weight("default").detach()
        outside = change.clone()
        for k in range(4):
            outside[height * k : height * (k + 1), 16 * k : 16 * (k + 1)] = 0
        assert not outside.any()
        assert torch.linalg.matrix_rank(change.double(), rtol=1e-6) == 12


def test_one_mini_lora_is_a_lora(load):
    ours = layers_of(load(), mini_loras=1)
    plain = dict(lora_layers(install_adapter(load(), plan_of("lora", **SETTINGS), None)))
    for name, layer in ours.items():
        for found, wanted in zip(factors_of(layer), factors_of(plain[name]), strict=True):
            assert torch.equal(found, wanted)
        assert layer.scaling == plain[name].scaling


def test_the_first_adam_step_moves_the_blocks_of_b_against_their_own_gradient(load):
    for layer in layers_of(load(), mini_loras=4).values():
        a = layer.lora_A["default"].blocks.detach().double()
        found, gradient = first_adam_step(layer, rate=0.01)
        height = layer.out_features // 4
        expected = torch.zeros_like(gradient)
        for k in range(4):
            rows, columns = slice(height * k, height * (k + 1)), slice(16 * k, 16 * (k + 1))
            step = -0.01 * torch.sign(gradient[rows, columns] @ a[k].T)
            expected[rows, columns] = 4.0 * step @ a[k]
        assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max())


def test_a_count_that_does_not_divide_is_refused_before_the_model_is_touched(load):
    model = load()
    with pytest.raises(
        CoraError,
        match=r"needs --mini-loras to divide the 64 inputs and 64 outputs of .*layers.0.self_attn.q_proj, which 3 does not",
    ):
        layers_of(model, mini_loras=3)
    assert not any("lora" in name for name, _ in model.named_modules())


def test_a_count_below_one_and_a_count_for_another_method_are_refused():
    common = {"model": "m", "dataset": "d", "output_dir": "o"}
    with pytest.raises(UsageError, match="--mini-loras must be at least 1, not 0"):
        TrainConfig(mode="melora", mini_loras=0, **common)
    with pytest.raises(UsageError, match="--mini-loras does not apply to mode lora"):
        TrainConfig(mode="lora", mini_loras=2, **common)


def test_the_start_is_known_to_an_inspection(load):
    made = plan_of("melora", **SETTINGS)
    for name, layer in layers_of(load()).items():
        assert torch.equal(METHODS["melora"].start_directions(made, None, name, 64, "input"), factors_of(layer)[0].T)
        assert METHODS["melora"].start_directions(made, None, name, layer.out_features, "output") is None
