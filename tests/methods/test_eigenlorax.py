"""EigenLoRAx: directions of earlier adapters, against numpy in float64; the tests of all methods run on it too."""

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from cora_cli.adapters.install import install_adapter
from cora_cli.errors import CoraError, UsageError
from cora_cli.methods.parts.layers import factors_of, lora_layers
from cora_cli.methods.registry import METHODS
from cora_cli.training.config import TrainConfig

from .helpers import first_adam_step, observed_in, plan_of

SETTINGS = {"rank": 2, "alpha": 8.0, "rslora": False, "target_modules": ("q_proj", "v_proj"), "dropout": 0.0, "seed": 3}
OWN = {"eigen_directions": 4, "eigen_random": 3}


@pytest.fixture
def load(tiny_model):
    return lambda: LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def installed(model, **own):
    plan = plan_of("eigenlorax", **SETTINGS, **{**OWN, **own})
    observed = observed_in(model, plan)
    return [(layer, observed[name]) for name, layer in lora_layers(install_adapter(model, plan, None, observed))]


def test_the_outer_factors_are_the_principal_directions_of_the_centred_factors_and_random_ones(load):
    for layer, observed in installed(load()):
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        for outer, columns in (
            (a.outer.T, [one.T for _, one in observed.sources]),
            (b.outer, [one for one, _ in observed.sources]),
        ):
            assert torch.allclose(outer.T @ outer, torch.eye(7), atol=1e-5)
            stacked = torch.cat(list(columns), dim=1).double().numpy()
            u = np.linalg.svd(stacked - stacked.mean(1, keepdims=True), full_matrices=False)[0][:, :4]
            first = outer[:, :4].double().numpy()
            assert np.allclose(first @ first.T, u @ u.T, atol=1e-4)


def test_with_all_directions_a_source_comes_back_up_to_the_mean_outside_of_them(load):
    """Six factors, centred, have five directions: what P cannot hold of a source is (I − P·Pᵀ)·mean."""
    for layer, observed in installed(load(), eigen_directions=5, eigen_random=0):
        p = layer.lora_B["default"].outer.double()
        columns = torch.cat([one for one, _ in observed.sources], dim=1).double()
        left = columns - p @ (p.T @ columns)
        mean = columns.mean(1, keepdim=True)
        assert torch.allclose(left, (mean - p @ (p.T @ mean)).expand_as(left), atol=1e-4)


def test_the_first_step_moves_the_coefficients_alone_and_there_is_no_scale(load):
    for layer, _ in installed(load()):
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        assert 0.4 < max(a.inner.abs().max(), b.inner.abs().max()) <= 0.5
        assert layer.scaling["default"] == 1.0
        inner_a, inner_b = a.inner.detach().double().clone(), b.inner.detach().double().clone()
        found, gradient = first_adam_step(layer, 0.01)
        left, right = b.outer.double(), a.outer.double()
        middle = left.T @ gradient @ right.T
        moved_b = inner_b - 0.01 * (middle @ inner_a.T).sign()
        moved_a = inner_a - 0.01 * (inner_b.T @ middle).sign()
        assert torch.allclose(found, left @ moved_b @ moved_a @ right, atol=1e-4)
        assert [factor.shape for factor in factors_of(layer)] == [(2, 64), (layer.out_features, 2)]


def test_the_count_is_2kr_for_each_layer():
    assert METHODS["eigenlorax"].layer_parameters(64, 32, plan_of("eigenlorax", **SETTINGS, **OWN)) == 2 * 7 * 2


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (
            {"eigen_directions": 6},
            r"--eigen-directions 6 is more than the 5 directions that the A of .*q_proj has in the start models; use",
        ),
        ({"eigen_random": 29}, r"ask for 33 directions, but .*v_proj has 32 dimensions on its smaller side"),
        ({"eigen_directions": 1, "eigen_random": 0}, "mode eigenlorax needs --rank ≤ 1, its number of directions, not 2"),
    ],
)
def test_more_directions_than_there_are_and_fewer_than_the_rank_are_refused(own, said, load):
    with pytest.raises(CoraError, match=said):
        installed(load(), **own)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "mode eigenlorax needs --start-models A,B,…: models that were fine-tuned from the base model"),
        ({"start_models": ("a",), "eigen_init": 0.0}, r"--eigen-init must be positive, not 0\.0"),
        ({"start_models": ("a",), "eigen_random": -1}, "--eigen-random must be at least 0, not -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        TrainConfig(**{"mode": "eigenlorax", "model": "m", "dataset": "d", "output_dir": "o", **settings})
