"""MiSS, HiRA and RandLoRA against PEFT's classes and their formulas; the tests of all methods run on them too."""

import math

import pytest
import torch
from peft import MissConfig, get_peft_model
from transformers import LlamaForCausalLM

from cora_cli.adapters.install import install_adapter
from cora_cli.errors import CoraError
from cora_cli.methods.parts.layers import adapted_layers, lora_layers
from cora_cli.methods.registry import METHODS

from .helpers import first_adam_step, plan_of

SETTINGS = {"rank": 5, "alpha": 15.0, "rslora": False, "target_modules": ("q_proj", "v_proj"), "dropout": 0.0, "seed": 3}
IDS = torch.tensor([[1, 5, 9, 100, 7, 3, 2, 40]])


@pytest.fixture
def load(tiny_model):
    return lambda: LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_miss_computes_what_peft_computes_with_the_same_block(load):
    """Rank 5 does not divide the 64 inputs."""
    ours = install_adapter(load(), plan_of("miss", **SETTINGS), None)
    theirs = get_peft_model(load(), MissConfig(r=5, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, layer in lora_layers(ours):
            layer.lora_B["default"].weight.normal_(std=0.1)
            block = theirs.get_base_model().get_submodule(name).miss_block["default"]
            block.copy_(layer.lora_B["default"].weight.T)
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-4)
    assert not torch.allclose(logits(ours), logits(load()), atol=1e-2)


def test_the_first_adam_step_of_miss_is_one_column_for_all_inputs_that_agree_modulo_the_rank(load):
    for _, layer in lora_layers(install_adapter(load(), plan_of("miss", **SETTINGS), None)):
        found, gradient = first_adam_step(layer, 0.01)
        for column in range(64):
            together = gradient[:, column % 5 :: 5].sum(1)
            assert torch.allclose(found[:, column], -0.01 * together.sign(), atol=1e-5)


def test_hira_multiplies_w_by_a_product_of_low_rank_and_starts_its_a_as_lora(load):
    wrapped = install_adapter(load(), plan_of("hira", **SETTINGS), None)
    plain = dict(lora_layers(install_adapter(load(), plan_of("lora", **SETTINGS), None)))
    for name, layer in adapted_layers(wrapped):
        a, b = layer.hira_A["default"], layer.hira_B["default"]
        assert torch.equal(a, plain[name].lora_A["default"].weight)
        x, pull = torch.randn(9, 64), torch.randn(9, layer.out_features)
        (layer(x) * pull).sum().backward()
        weight, gradient = layer.base_layer.weight.detach().double(), pull.double().T @ x.double()
        expected = (gradient * weight) @ a.detach().double().T
        assert torch.allclose(b.grad.double(), expected, atol=1e-4 * expected.abs().max())
        torch.nn.init.normal_(b)
        with torch.no_grad():
            found = (layer(x) - layer.base_layer(x)).double()
        wanted = x.double() @ (weight * (b.detach().double() @ a.detach().double())).T
        assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max())


@pytest.mark.parametrize("name", ["q_proj", "v_proj"])
def test_randlora_sums_scaled_random_pairs_to_more_than_their_rank(name, load):
    wrapped = install_adapter(load(), plan_of("randlora", **{**SETTINGS, "target_modules": (name,)}), None)
    _, layer = next(adapted_layers(wrapped))
    out, smaller = layer.out_features, min(layer.out_features, 64)
    lambdas, gammas = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
    count = math.ceil(smaller / 5)
    assert (lambdas.shape, gammas.shape) == ((5, count), (count, smaller))
    assert not lambdas.any()
    assert torch.equal(gammas, torch.full_like(gammas, 1 / max(count, smaller)))
    torch.nn.init.normal_(lambdas)
    torch.nn.init.normal_(gammas)
    a, b = (buffers["default"].double() for buffers in (layer.randlora_A, layer.randlora_B))
    expected = torch.zeros(max(out, 64), smaller, dtype=torch.float64)
    for pair in range(count * 5):  # PEFT numbers the columns of all B_j by j and rank, and the rows of all A_j by rank and j
        column = b[: max(out, 64), pair // 5, pair % 5]
        rank, base = pair // count, pair % count
        expected += 3.0 * torch.outer(column, (lambdas[rank, base] * a[rank, 0, :smaller] * gammas[base]).double().detach())
    expected = expected.T if out < 64 else expected
    change = layer.get_delta_weight("default").detach().double()
    assert torch.allclose(change, expected, rtol=1e-3, atol=1e-3)
    assert torch.linalg.matrix_rank(change, rtol=1e-6) > 5


def test_alpha_over_the_root_of_the_number_of_bases_is_the_scale_of_randloras_authors(load):
    alpha, bases = 80.0, 64 // 4
    plan = plan_of("randlora", **{**SETTINGS, "rank": 4, "alpha": alpha / bases**0.5, "target_modules": ("q_proj",)})
    layers = [module for module in install_adapter(load(), plan, None).modules() if hasattr(module, "randlora_lambda")]
    assert [layer.randlora_lambda["default"].shape for layer in layers] == [(4, bases)] * 2
    assert [layer.scaling["default"] for layer in layers] == [pytest.approx(alpha / (4 * bases**0.5))] * 2


def test_a_lower_rank_of_randlora_trains_more():
    counts = [METHODS["randlora"].layer_parameters(576, 576, plan_of("randlora", **{**SETTINGS, "rank": r})) for r in (16, 64)]
    assert counts == [36 * (16 + 576), 9 * (64 + 576)]


@pytest.mark.parametrize(
    ("mode", "rank", "said"),
    [
        ("miss", 65, r"mode miss needs --rank ≤ 64 for .*q_proj, not 65"),
        ("randlora", 33, r"mode randlora needs --rank ≤ 32 for .*v_proj, its smaller dimension, not 33"),
    ],
)
def test_a_rank_above_the_dimensions_of_a_weight_is_refused(mode, rank, said, load):
    with pytest.raises(CoraError, match=said):
        install_adapter(load(), plan_of(mode, **{**SETTINGS, "rank": rank}), None)
