"""LoRI's two stages and its mask; the tests of all methods run on it too."""

import pytest
import torch
from transformers import LlamaForCausalLM

from cora_cli.adapters.install import install_adapter
from cora_cli.errors import CoraError, UsageError
from cora_cli.methods.method import Step
from cora_cli.methods.parts.layers import lora_layers
from cora_cli.methods.registry import METHODS
from cora_cli.training.config import TrainConfig

from .helpers import plan_of

SETTINGS = {"rank": 4, "alpha": 8.0, "rslora": False, "target_modules": ("q_proj", "v_proj"), "dropout": 0.0, "seed": 3}
IDS = torch.tensor([[1, 5, 9, 100, 7, 3, 2, 40]])
METHOD = METHODS["lori"]


@pytest.fixture
def wrapped(tiny_model):
    return install_adapter(LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), plan_of("lori", **SETTINGS), None)


def step(wrapped, made, optimizer, number, total=4):
    wrapped(IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    METHOD.after_step(wrapped, made, Step(number, total, optimizer))


def test_after_the_first_stage_the_largest_entries_of_all_layers_start_again_alone(wrapped):
    made = plan_of("lori", **SETTINGS, lori_kept=0.1)
    factors = [layer.lora_B["default"] for _, layer in lora_layers(wrapped)]
    optimizer = torch.optim.AdamW([b.weight for b in factors], lr=0.01, weight_decay=0.1)
    step(wrapped, made, optimizer, 1)
    assert all(b.weight.all() for b in factors)
    wrapped(IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    dense = torch.cat([b.weight.detach().abs().flatten() for b in factors])
    METHOD.after_step(wrapped, made, Step(2, 4, optimizer))
    masks = torch.cat([b.mask.flatten() for b in factors])
    assert masks.sum() == round(0.1 * len(dense))
    assert dense[masks].min() >= dense[~masks].max()
    assert not any(b.weight.any() for b in factors)
    assert not optimizer.state
    for number in (3, 4):
        step(wrapped, made, optimizer, number)
    trained = torch.cat([b.weight.detach().flatten() for b in factors])
    assert torch.equal(trained.bool(), masks)


def test_a_is_that_of_lora_and_does_not_train(wrapped, tiny_model):
    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    plain = dict(lora_layers(install_adapter(model, plan_of("lora", **SETTINGS), None)))
    for name, layer in lora_layers(wrapped):
        assert not layer.lora_A["default"].weight.requires_grad
        assert torch.equal(layer.lora_A["default"].weight, plain[name].lora_A["default"].weight)


@pytest.mark.parametrize(("own", "steps"), [({}, 1), ({"lori_dense_steps": 4}, 4)])
def test_a_run_without_a_step_for_each_stage_is_refused(own, steps):
    with pytest.raises(
        CoraError, match=r"mode lori needs a step for each of its stages: .* change --lori-dense-steps or the length"
    ):
        METHOD.check_run(plan_of("lori", **SETTINGS, **own), [], steps)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lori_kept": 0.0}, r"--lori-kept must be above 0 and at most 1, not 0\.0"),
        ({"lori_dense_steps": 0}, "--lori-dense-steps must be at least 1, not 0"),
        ({"mode": "lora", "lori_kept": 0.5}, "--lori-kept does not apply to mode lora"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        TrainConfig(**{"mode": "lori", "model": "m", "dataset": "d", "output_dir": "o", **settings})
