"""The loss of CLoRA against its formula in float64."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from cora_cli.adapters.install import install_adapter
from cora_cli.errors import UsageError
from cora_cli.methods.clora import DIRECTIONS
from cora_cli.methods.parts.layers import ADAPTER, lora_layers
from cora_cli.methods.registry import METHODS
from cora_cli.training.config import TrainConfig
from cora_cli.training.run import train
from tests.methods.helpers import plan_of
from tests.training.helpers import config_for, log_lines

METHOD = METHODS["clora"]


def plan(**own):
    shared = {"rank": 4, "alpha": 8.0, "rslora": False, "target_modules": ("q_proj", "v_proj"), "dropout": 0.0, "seed": 0}
    return plan_of("clora", **shared, **own)


@pytest.fixture
def install(tiny_model: Path):
    def installed(made):
        wrapped = install_adapter(LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), made, None)
        for _, layer in lora_layers(wrapped):
            torch.nn.init.normal_(layer.lora_B[ADAPTER].weight, std=0.1)
        return wrapped

    return installed


def test_the_loss_and_its_gradient_are_those_of_the_formula(install):
    made = plan(clora_weight=0.7, clora_rank=5)
    wrapped = install(made)
    loss = METHOD.added_loss(wrapped, made)
    loss.backward()
    expected = 0.0
    for _, layer in lora_layers(wrapped):
        a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        v, u = (getattr(linear, DIRECTIONS).double() for linear in (a, b))
        assert v.shape == (64, 5)
        assert u.shape == (layer.out_features, 5)
        assert torch.allclose(v.T @ v, torch.eye(5, dtype=torch.float64), atol=1e-6)
        assert torch.allclose(a.weight.grad.double(), 0.7 * a.weight.double() @ v @ v.T, atol=1e-6)
        assert torch.allclose(b.weight.grad.double(), 0.7 * u @ u.T @ b.weight.double(), atol=1e-6)
        expected += 0.7 * ((a.weight.double() @ v).square().sum() + (b.weight.double().T @ u).square().sum()) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_with_as_many_directions_as_a_layer_has_it_is_the_norm_of_its_factors(install):
    made = plan()  # 128 directions, more than the 64 and 32 that there are
    wrapped = install(made)
    squares = [parameter.square().sum() for parameter in wrapped.parameters() if parameter.requires_grad]
    assert METHOD.added_loss(wrapped, made).item() == pytest.approx(torch.stack(squares).sum().item() / 2, rel=1e-5)


def test_the_directions_come_from_the_seed_and_are_not_stored(install):
    one, other = install(plan(clora_rank=3)), install(plan(clora_rank=3))
    assert not any(DIRECTIONS in key for key in one.state_dict())
    pairs = list(zip(one.named_buffers(), other.named_buffers(), strict=True))
    drawn = [(first, second) for (name, first), (_, second) in pairs if DIRECTIONS in name]
    assert len(drawn) == 8
    assert all(torch.equal(first, second) for first, second in drawn)
    assert not torch.equal(drawn[0][0], drawn[2][0])


def test_with_a_weight_of_zero_every_step_is_that_of_lora(tiny_model: Path, tiny_data: Path, tmp_path: Path):
    """And with another weight the steps are others, from the same start."""
    common = {"max_steps": 6, "batch_size": 4, "dropout": 0.1, "learning_rate": 1e-2}
    runs = {"lora": {"mode": "lora"}, "zero": {"mode": "clora", "clora_weight": 0.0}, "one": {"mode": "clora"}}
    for name, settings in runs.items():
        train(config_for(tiny_model, tiny_data, tmp_path / name, **common, **settings))
    lora, zero, one = (log_lines(tmp_path / name) for name in runs)
    assert [line["step"] for line in zero] == [1, 2, 3, 4, 5, 6]
    assert zero == lora
    assert all(other["loss"] != line["loss"] for other, line in zip(one[1:], lora[1:], strict=True))
    stored = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in runs]
    assert stored[0].keys() == stored[1].keys() == stored[2].keys()
    assert all(torch.equal(stored[0][key], stored[1][key]) for key in stored[0])
    assert not any(torch.equal(stored[0][key], stored[2][key]) for key in stored[0])


def test_what_makes_no_sense_is_refused():
    common = {"model": "m", "dataset": "d", "output_dir": "o"}
    for settings, said in (
        ({"mode": "clora", "clora_weight": -1.0}, "--clora-weight must be at least 0, not -1.0"),
        ({"mode": "clora", "clora_rank": 0}, "--clora-rank must be at least 1, not 0"),
        ({"mode": "lora", "clora_rank": 8}, "--clora-rank does not apply to mode lora"),
    ):
        with pytest.raises(UsageError, match=said):
            TrainConfig(**common, **settings)
