"""PRoLoRA, checked against the authors' index arithmetic in float64; the tests of all methods run on it too."""

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

SETTINGS = {"rank": 7, "alpha": 14.0, "rslora": False, "target_modules": ("q_proj", "v_proj"), "dropout": 0.0, "seed": 3}
SHARED = {"unshared_rank": 2, "a_copies": 3, "b_copies": 5}
"""64 inputs in three chunks of 22, 32 outputs in five of 7: the last copies are cut."""


def theirs(chunk, copies, length, own):
    """`de_reduce` of Forence1999/PRoLoRA for a chunk (ranks, ⌈length / copies⌉), as (ranks in all, length)."""
    ranks, shift = len(chunk), max(math.floor(len(chunk) / copies), 1)
    chunks = chunk.unsqueeze(-1).repeat(1, 1, copies)
    index = torch.arange(ranks)[:, None, None].expand_as(chunks)
    chunks = torch.gather(chunks, 0, (index + torch.arange(copies)[None, None] * shift) % ranks)
    whole = torch.cat(torch.split(chunks, 1, dim=-1), dim=-2).squeeze(-1).t()[:length]
    return torch.cat([own.t(), whole], dim=-1).t()


def whole_factors(layer):
    """The authors' A (r, in) and B (out, r), with gradients to the trained tensors."""
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    return (
        theirs(a.chunk.double(), 3, 64, a.own.double()),
        theirs(b.chunk.double().T, 5, layer.out_features, b.own.double().T).T,
    )


@pytest.fixture
def load(tiny_model):
    return lambda: LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def layers_of(model, **changes):
    return dict(lora_layers(install_adapter(model, plan_of("prolora", **{**SETTINGS, **SHARED, **changes}), None)))


def move(layer):
    for parameter in layer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)


def test_both_parts_of_a_start_with_the_range_of_the_full_width(load):
    for layer in layers_of(load()).values():
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        assert (a.own.shape, a.chunk.shape) == ((2, 64), (5, 22))
        assert (b.own.shape, b.chunk.shape) == ((layer.out_features, 2), (math.ceil(layer.out_features / 5), 5))
        assert not b.own.any()
        assert not b.chunk.any()
        assert all(0.9 / 8 < part.abs().max() <= 1 / 8 for part in (a.own, a.chunk))


def test_the_factors_and_the_forward_pass_are_the_authors(load):
    for layer in layers_of(load()).values():
        move(layer)
        wanted_a, wanted_b = (factor.detach() for factor in whole_factors(layer))
        a, b = factors_of(layer)
        assert torch.equal(a.double(), wanted_a)
        assert torch.equal(b.double(), wanted_b)
        x = torch.randn(2, 5, 64)
        with torch.no_grad():
            found = layer(x) - layer.base_layer(x)
        assert torch.allclose(found.double(), 2.0 * x.double() @ wanted_a.T @ wanted_b.T, rtol=1e-3, atol=1e-3)


def test_the_gradient_of_a_chunk_is_the_sum_of_its_copies_rolled_forward(load):
    layer = next(iter(layers_of(load()).values()))
    move(layer)
    a = layer.lora_A["default"]
    of_whole = torch.randn(7, 64)
    (a.matrix() * of_whole).sum().backward()
    padded = torch.cat([of_whole[2:], torch.zeros(5, 2)], dim=1)  # the last copy was cut by two columns
    expected = sum(padded[:, 22 * copy : 22 * (copy + 1)].roll(copy, 0) for copy in range(3))
    assert torch.allclose(a.chunk.grad, expected, atol=1e-5)
    assert torch.equal(a.own.grad, of_whole[:2])


def test_the_first_adam_step_is_that_of_the_authors_parameters(load):
    for layer in layers_of(load()).values():
        a = whole_factors(layer)[0].detach()
        found, gradient = first_adam_step(layer, rate=0.01)
        out = layer.out_features
        own = torch.zeros(out, 2, dtype=torch.float64, requires_grad=True)
        chunk = torch.zeros(math.ceil(out / 5), 5, dtype=torch.float64, requires_grad=True)
        (theirs(chunk.T, 5, out, own.T).T @ a * gradient).sum().backward()
        step = theirs(-0.01 * chunk.grad.sign().T, 5, out, -0.01 * own.grad.sign().T).T
        expected = 2.0 * step @ a
        assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max())


def test_one_copy_of_each_is_a_lora(load):
    ours = layers_of(load(), unshared_rank=3, a_copies=1, b_copies=1)
    plain = dict(lora_layers(install_adapter(load(), plan_of("lora", **SETTINGS), None)))
    for name, layer in ours.items():
        assert all(torch.equal(*pair) for pair in zip(factors_of(layer), factors_of(plain[name]), strict=True))


def test_the_count_is_that_of_the_paper_and_of_the_model(load):
    made = plan_of("prolora", **SETTINGS, **SHARED)
    wrapped = install_adapter(load(), made, None)
    trained = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    shapes = {f"{layer}.{name}": shape for layer in range(2) for name, shape in (("q", (64, 64)), ("v", (32, 64)))}
    by_hand = 2 * (2 * (64 + 64) + 5 * (22 + 13) + 2 * (32 + 64) + 5 * (22 + 7))
    assert METHODS["prolora"].parameters(shapes, made) == trained == by_hand


def test_all_ranks_may_be_shared(load):
    for layer in layers_of(load(), unshared_rank=0).values():
        first_adam_step(layer, rate=0.01)
        assert torch.isfinite(layer.get_delta_weight("default")).all()


def test_without_the_settings_a_quarter_of_the_ranks_is_unshared_and_chunks_have_two_copies():
    assert plan_of("prolora", **{**SETTINGS, "rank": 8}).own == {"unshared_rank": 2, "a_copies": 2, "b_copies": 2}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"unshared_rank": 8}, "--unshared-rank must be below --rank 8, not 8: with all ranks unshared, use mode lora"),
        ({"unshared_rank": -1}, "--unshared-rank must be at least 0, not -1"),
        ({"a_copies": 0}, "--a-copies must be at least 1, not 0"),
        ({"b_copies": 0}, "--b-copies must be at least 1, not 0"),
        ({"rank": 0}, "--rank must be at least 1, not 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        TrainConfig(**{"mode": "prolora", "rank": 8, "model": "m", "dataset": "d", "output_dir": "o", **settings})


def test_more_copies_than_a_layer_has_parts_for_are_refused(load):
    with pytest.raises(CoraError, match=r"--b-copies 25 leaves no part of the 64 outputs of .*q_proj for the last copy"):
        layers_of(load(), b_copies=25)


def test_the_start_is_known_to_an_inspection(load):
    made = plan_of("prolora", **SETTINGS, **SHARED)
    for name, layer in layers_of(load()).items():
        assert torch.equal(METHODS["prolora"].start_directions(made, None, name, 64, "input"), factors_of(layer)[0].T)
