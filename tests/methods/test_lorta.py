"""LoRTA, checked against the tensor's slices as the authors build them, in float64; the tests of all methods run on it too."""

import math

import pytest
import torch
from transformers import LlamaForCausalLM

from cora_cli.adapters.install import install_adapter
from cora_cli.errors import CoraError, UsageError
from cora_cli.methods.parts.layers import lora_layers
from cora_cli.methods.registry import METHODS
from cora_cli.training.config import TrainConfig

from .helpers import plan_of

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
SETTINGS = {"rank": 3, "alpha": 12.0, "rslora": False, "target_modules": TARGETS, "dropout": 0.0, "seed": 3}
IDS = torch.tensor([[1, 5, 9, 100, 7, 3, 2, 40]])


def theirs(layer):
    """`_compute_weights_from_tensor` of ihounie/lorta for one weight, in float64, without s."""
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    core = b.projections[b._projection].double() * b.layers[b._layer].double()
    return torch.cat([b.outputs.double() @ torch.diag(head * core) @ a.inputs.double() for head in a.heads.double()], dim=1)


@pytest.fixture
def load(tiny_model):
    return lambda: LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture
def load_square(tiny_multihead_model):
    return lambda: LlamaForCausalLM.from_pretrained(tiny_multihead_model, dtype=torch.float32).eval()


def installed(model, **changes):
    return install_adapter(model, METHODS["lorta"].for_model(plan_of("lorta", **{**SETTINGS, **changes}), 4), None)


@torch.no_grad()
def move(wrapped):
    generator = torch.Generator().manual_seed(5)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def test_square_attention_has_the_authors_count_and_five_shared_parameters(load_square):
    wrapped = installed(load_square())
    parameters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    assert sorted(tuple(one.shape) for one in parameters) == [(2, 3), (3, 16), (4, 3), (4, 3), (64, 3)]
    count = sum(parameter.numel() for parameter in parameters)
    assert count == 3 * (64 + 64 // 4 + 4 + 2 + 4)  # r(d + d/H + H + L + 4)
    shapes = {f"model.layers.{layer}.self_attn.{name}": (64, 64) for layer in range(2) for name in TARGETS}
    made = METHODS["lorta"].for_model(plan_of("lorta", **SETTINGS), 4)
    assert METHODS["lorta"].parameters(shapes, made) == count


def test_weights_of_each_shape_share_a_tensor_of_their_own(load):
    layers = dict(lora_layers(installed(load())))
    owners = {}
    for name, layer in layers.items():
        owners.setdefault(id(layer.lora_A["default"].inputs), set()).add(name.rpartition(".")[2])
    assert sorted(map(sorted, owners.values())) == [["k_proj", "v_proj"], ["o_proj", "q_proj"]]


def test_the_start_is_the_authors_and_the_init_scale_narrows_it(load):
    for scale in (0.0, 1.0):
        for _, layer in lora_layers(installed(load(), lorta_init_scale=scale)):
            a, b = layer.lora_A["default"], layer.lora_B["default"]
            assert not a.inputs.any()
            assert 0.9 / math.sqrt(3) < b.outputs.abs().max() <= 1 / math.sqrt(3)
            bound = math.sqrt(6 / (3 * (1 + 5 * scale**2)))
            for core in (a.heads, b.projections, b.layers):
                assert 0.3 * bound < core.abs().max() <= bound
            assert layer.scaling["default"] == 4.0


def test_the_layer_computes_the_slice_of_the_tensor_and_its_rank_is_r(load):
    wrapped = installed(load())
    move(wrapped)
    for _, layer in lora_layers(wrapped):
        change = 4.0 * theirs(layer).detach()
        x = torch.randn(2, 5, 64)
        with torch.no_grad():
            found = layer(x) - layer.base_layer(x)
        assert torch.allclose(found.double(), x.double() @ change.T, rtol=1e-3, atol=2e-3)
        assert torch.allclose(layer.get_delta_weight("default").double(), change, atol=1e-4)
        assert torch.linalg.matrix_rank(change, rtol=1e-9) == 3


def test_layers_with_equal_vectors_have_equal_changes(load_square):
    wrapped = installed(load_square())
    move(wrapped)
    layers = dict(lora_layers(wrapped))
    one, other = (layers[f"model.layers.{number}.self_attn.q_proj"] for number in range(2))
    assert not torch.allclose(one.get_delta_weight("default"), other.get_delta_weight("default"))
    with torch.no_grad():
        one.lora_B["default"].layers[1] = one.lora_B["default"].layers[0]
    assert torch.equal(one.get_delta_weight("default"), other.get_delta_weight("default"))


def test_the_gradient_of_each_shared_parameter_is_that_of_the_sum_over_weights(load_square):
    wrapped = installed(load_square())
    move(wrapped)
    generator = torch.Generator().manual_seed(1)
    pulls = {name: torch.randn(64, 64, generator=generator, dtype=torch.float64) for name, _ in lora_layers(wrapped)}
    ours, reference = 0.0, 0.0
    for name, layer in lora_layers(wrapped):
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        ours = ours + (4.0 * (b(a(torch.eye(64)))).T * pulls[name].float()).sum()
        reference = reference + (4.0 * theirs(layer) * pulls[name]).sum()
    parameters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    found, wanted = (torch.autograd.grad(loss, parameters) for loss in (ours, reference))
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3 * other.abs().max())


def test_the_first_adam_step_moves_the_inputs_alone(load_square):
    wrapped = installed(load_square())
    parameters = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    wrapped(IDS, labels=IDS).loss.backward()
    torch.optim.Adam(parameters.values(), lr=0.01, eps=1e-30).step()
    for name, parameter in parameters.items():
        if name.endswith("inputs"):
            assert torch.allclose(parameter, -0.01 * parameter.grad.sign(), atol=1e-6)
        else:
            assert torch.equal(parameter, before[name])


def test_heads_that_do_not_divide_the_inputs_or_are_not_known_are_refused(load):
    model = load()
    with pytest.raises(
        CoraError, match=r"divides the 64 inputs of .*q_proj by the number of heads, 7, which does not divide them; choose --t"
    ):
        installed(model, tensor_heads=7)
    with pytest.raises(CoraError, match=r"mode lorta needs --tensor-heads: this model's config.json does not state"):
        install_adapter(model, METHODS["lorta"].for_model(plan_of("lorta", **SETTINGS), None), None)
    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tensor_heads": 0}, "--tensor-heads must be at least 1, not 0"),
        ({"lorta_init_scale": -1.0}, "--lorta-init-scale must be at least 0, not -1.0"),
        ({"mode": "lora", "tensor_heads": 4}, "--tensor-heads does not apply to mode lora"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        TrainConfig(**{"mode": "lorta", "model": "m", "dataset": "d", "output_dir": "o", **settings})


def test_the_start_is_known_to_an_inspection(load):
    method, made = METHODS["lorta"], plan_of("lorta", **SETTINGS)
    for name, layer in lora_layers(installed(load())):
        start = method.start_directions(made, None, name, layer.out_features, "output").double()
        b = layer.lora_B["default"].weight.double()
        both = torch.linalg.matrix_rank(torch.cat([start, b], dim=1), rtol=1e-5)
        assert both == torch.linalg.matrix_rank(start, rtol=1e-5) == 3
        assert method.start_directions(made, None, name, 64, "input") is None
