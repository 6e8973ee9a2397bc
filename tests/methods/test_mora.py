"""MoRA, types 1 and 6, checked against the authors' forward pass in float64; the tests of all methods run on it too."""

import math

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from cora_cli.adapters.facts import AdapterFacts
from cora_cli.adapters.install import install_adapter
from cora_cli.adapters.loading import load_adapter
from cora_cli.adapters.storage import save_adapter
from cora_cli.errors import CoraError, UsageError
from cora_cli.methods.parts.layers import lora_layers
from cora_cli.methods.parts.square import Compression, Expansion
from cora_cli.methods.registry import METHODS
from cora_cli.models.references import resolve_model
from cora_cli.training.config import TrainConfig
from cora_cli.weights.sources import open_source

from .helpers import first_adam_step, plan_of

SETTINGS = {"rank": 4, "alpha": 8.0, "rslora": False, "target_modules": ("q_proj", "v_proj"), "dropout": 0.0, "seed": 3}
SIZES = {"mora-1": {"q_proj": 23, "v_proj": 20}, "mora-6": {"q_proj": 22, "v_proj": 20}}
"""⌊√((64 + 64)·4) + ½⌋ and ⌊√((32 + 64)·4) + ½⌋, even for type 6."""
TYPES = list(SIZES)


def theirs(x, square, out_f, rotates):
    """`_apply_mora` of kongds/MoRA for types 1 and 6, written down again in float64."""
    in_f, r = x.shape[-1], len(square)
    count = math.ceil(in_f / r)
    x = torch.cat([x, x[..., : count * r - in_f]], -1).view(*x.shape[:-1], count, r)
    if rotates:
        angles = torch.outer(torch.arange(count).double(), 1.0 / (10000 ** (torch.arange(0, r, 2).double() / r)))
        cos, sin = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))
        out = (x * cos + torch.cat((-x[..., r // 2 :], x[..., : r // 2]), -1) * sin) @ square.T
        out = out.flatten(-2)[..., :out_f]
    else:
        out = x.sum(-2) @ square.T
    return torch.cat([out] * math.ceil(out_f / out.shape[-1]), -1)[..., :out_f]


@pytest.fixture
def load(tiny_model):
    return lambda: LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def installed(model, mode, **changes):
    return install_adapter(model, plan_of(mode, **{**SETTINGS, **changes}), None)


@pytest.mark.parametrize("mode", TYPES)
def test_the_matrix_is_square_starts_at_zero_and_has_no_scale(mode, load):
    for name, layer in lora_layers(installed(load(), mode)):
        square = layer.lora_B["default"].square
        assert square.shape == (SIZES[mode][name.rpartition(".")[2]],) * 2
        assert not square.any()
        assert layer.scaling["default"] == 1.0


@pytest.mark.parametrize("mode", TYPES)
def test_the_layer_computes_what_the_authors_do_and_its_change_of_the_weight_is_that_map(mode, load):
    for _, layer in lora_layers(installed(load(), mode)):
        square = torch.nn.init.normal_(layer.lora_B["default"].square)
        x = torch.randn(2, 5, 64)
        wanted = theirs(x.double(), square.double(), layer.out_features, mode == "mora-6")
        with torch.no_grad():
            assert torch.allclose((layer(x) - layer.base_layer(x)).double(), wanted, rtol=1e-3, atol=1e-3)
        change = theirs(torch.eye(64).double(), square.double(), layer.out_features, mode == "mora-6").T
        assert torch.allclose(layer.get_delta_weight("default").double(), change, atol=1e-5)
        rank = torch.linalg.matrix_rank(change, rtol=1e-9)
        assert rank <= len(square) if mode == "mora-1" else rank == min(layer.out_features, 64)


@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize(("out", "inside", "size"), [(12, 40, 6), (40, 12, 6), (13, 29, 8), (16, 16, 16)])
def test_the_matrices_are_the_maps_for_every_shape(rotates, out, inside, size):
    compression = Compression(inside, size, rotates)
    expansion = Expansion(torch.randn(size, size), compression.blocks, out)
    x = torch.randn(3, inside)
    assert torch.allclose(compression(x), x @ compression.weight.T, atol=1e-5)
    wanted = theirs(x.double(), expansion.square.detach().double(), out, rotates).float()
    assert torch.allclose(expansion(compression(x)), wanted, atol=1e-4)
    assert torch.allclose(x @ (expansion.weight @ compression.weight).T, wanted, atol=1e-4)


def test_where_the_outputs_are_cut_later_inputs_have_no_effect():
    compression = Compression(40, 6, rotates=True)
    change = Expansion(torch.randn(6, 6), compression.blocks, 12).weight @ compression.weight
    assert change[:, :12].any(dim=0).all()
    # The last block is padded with the first inputs, and it is cut too.
    assert not change[:, 12:].any()


@pytest.mark.parametrize("mode", TYPES)
def test_the_first_adam_step_follows_the_gradient_of_the_square(mode, load):
    for _, layer in lora_layers(installed(load(), mode)):
        q = len(layer.lora_B["default"].square)
        found, gradient = first_adam_step(layer, rate=0.01)
        square = torch.zeros(q, q, dtype=torch.float64, requires_grad=True)
        (theirs(torch.eye(64).double(), square, layer.out_features, mode == "mora-6").T * gradient).sum().backward()
        assert square.grad.any()
        step = -0.01 * square.grad.sign()
        wanted = theirs(torch.eye(64).double(), step, layer.out_features, mode == "mora-6").T
        assert torch.allclose(found, wanted, atol=1e-4 * wanted.abs().max())


def facts_of(made, base):
    return AdapterFacts(made, str(base), None, "0" * 64, None, None, compact=False)


def test_type_six_is_stored_as_its_squares_and_read_by_cora_alone(load, tiny_model, tmp_path):
    made = plan_of("mora-6", **SETTINGS)
    wrapped = install_adapter(load(), made, None)
    for _, layer in lora_layers(wrapped):
        torch.nn.init.normal_(layer.lora_B["default"].square)
    save_adapter(wrapped, tmp_path / "adapter", facts_of(made, tiny_model))
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size < 4 * 2 * (22**2 + 20**2) + 1500
    for trainable in (False, True):
        again = load_adapter(load(), resolve_model(str(tmp_path / "adapter")), trainable=trainable)
        assert any(parameter.requires_grad for parameter in again.parameters()) is trainable
        for (_, one), (_, other) in zip(lora_layers(again), lora_layers(wrapped), strict=True):
            assert torch.equal(one.lora_B["default"].square, other.lora_B["default"].square)
    with pytest.raises((KeyError, ValueError), match="CORA_mora-6"):
        PeftModel.from_pretrained(load(), str(tmp_path / "adapter"))
    base = open_source(resolve_model(str(tiny_model)))
    with pytest.raises(CoraError, match="is a CORA_mora-6 adapter, and only LORA adapters are read; `cora export` makes"):
        open_source(resolve_model(str(tmp_path / "adapter")), base)


def test_a_file_that_does_not_fit_is_an_error(load, tiny_model, tmp_path):
    made = plan_of("mora-6", **SETTINGS)
    save_adapter(installed(load(), "mora-6"), tmp_path / "untrained", facts_of(made, tiny_model))
    with pytest.raises(CoraError, match="was trained, but changes no weight"):
        load_adapter(load(), resolve_model(str(tmp_path / "untrained")))
    save_adapter(installed(load(), "mora-6", target_modules=("q_proj",)), tmp_path / "fewer", facts_of(made, tiny_model))
    with pytest.raises(CoraError, match=r"2 keys do not fit the model, the first, .*v_proj.lora_B.square, is missing"):
        load_adapter(load(), resolve_model(str(tmp_path / "fewer")))
    save_adapter(installed(load(), "mora-6", rank=5), tmp_path / "other-rank", facts_of(made, tiny_model))
    with pytest.raises(CoraError, match=r"cannot be loaded: .*lora_B.* in its file, but .* they do not belong together"):
        load_adapter(load(), resolve_model(str(tmp_path / "other-rank")))


@pytest.mark.parametrize(("mode", "size"), [("mora-1", 35), ("mora-6", 34)])
def test_a_rank_that_makes_the_matrix_larger_than_the_weight_is_refused(mode, size, load):
    model = load()
    said = f"--rank 13 gives mode {mode} a matrix of {size} × {size} for .*v_proj, whose smaller dimension is 32; choose a lower rank"
    with pytest.raises(CoraError, match=said):
        installed(model, mode, rank=13)
    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("flags", [{"alpha": 4.0}, {"rslora": True}, {"a_init": "zeros"}])
def test_settings_of_lora_that_mora_lacks_are_refused(flags):
    name = next(iter(flags)).replace("_", "-")
    with pytest.raises(UsageError, match=f"--{name} does not apply to mode mora-6"):
        TrainConfig(mode="mora-6", model="m", dataset="d", output_dir="o", **flags)


def test_nothing_of_it_is_drawn():
    made = plan_of("mora-1", **SETTINGS)
    assert all(METHODS["mora-1"].start_directions(made, None, "q_proj", 64, side) is None for side in ("input", "output"))
