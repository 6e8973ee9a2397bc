"""VB-LoRA and Uni-LoRA, checked against PEFT's own layers with the same weights; the tests of all methods run on them too."""

import pytest
import torch
from peft import UniLoraConfig, VBLoRAConfig, get_peft_model
from peft.tuners.unilora.model import UniLoraModel
from transformers import LlamaForCausalLM

from cora_cli.adapters.install import install_adapter
from cora_cli.errors import CoraError, UsageError
from cora_cli.methods.parts.layers import lora_layers
from cora_cli.methods.registry import METHODS
from cora_cli.training.config import TrainConfig

from .helpers import SMALL, plan_of

SETTINGS = {"rank": 4, "alpha": 12.0, "rslora": False, "target_modules": ("q_proj", "v_proj"), "dropout": 0.0, "seed": 3}
IDS = torch.tensor([[1, 5, 9, 100, 7, 3, 2, 40]])


@pytest.fixture
def load(tiny_model):
    return lambda: LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def installed(model, mode, **changes):
    return install_adapter(model, plan_of(mode, **{**SETTINGS, **SMALL[mode], **changes}), None)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_vb_lora_computes_what_peft_computes_with_the_same_bank_and_logits(load):
    ours = installed(load(), "vb-lora")
    config = VBLoRAConfig(
        r=4, num_vectors=20, vector_length=16, target_modules=["q_proj", "v_proj"], topk=2, task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(load(), config)
    layers = dict(lora_layers(ours))
    with torch.no_grad():
        for parameter in {id(one): one for one in ours.parameters() if one.requires_grad}.values():
            parameter.mul_(20)
        theirs.base_model.vblora_vector_bank["default"].copy_(next(iter(layers.values())).lora_A["default"].bank)
        for name, layer in layers.items():
            other = theirs.get_base_model().get_submodule(name)
            for factor in "AB":
                logits_of = getattr(other, f"vblora_logits_{factor}")["default"]
                logits_of.copy_(getattr(layer, f"lora_{factor}")["default"].logits.view(logits_of.shape))
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-4)
    assert not torch.allclose(logits(ours), logits(load()), atol=1e-2)


def test_logits_that_are_not_among_the_largest_have_no_gradient_and_the_bank_has_its_own_rate(load):
    ours = installed(load(), "vb-lora")
    ours(IDS, labels=IDS).loss.backward()
    for _, layer in lora_layers(ours):
        factor = layer.lora_A["default"]
        kept = factor.logits.topk(2).indices
        assert torch.equal(factor.logits.grad.bool().sum(1), torch.full((len(kept),), 2))
        assert factor.logits.grad.gather(1, kept).all()
    made = plan_of("vb-lora", **SETTINGS, **SMALL["vb-lora"])
    groups = METHODS["vb-lora"].optimizer(ours, torch.optim.AdamW, {"lr": 0.01}, 0.0, made).param_groups
    assert [(len(group["params"]), group["lr"]) for group in groups] == [(8, 0.01), (1, pytest.approx(0.001))]


def test_the_start_of_vb_lora_has_the_authors_sizes(load):
    layer = next(layer for _, layer in lora_layers(installed(load(), "vb-lora")))
    bank, logits_of = layer.lora_A["default"].bank, layer.lora_A["default"].logits
    assert 0.9 * 0.02 < bank.abs().max() <= 0.02
    assert logits_of.std().item() == pytest.approx(0.1, rel=0.2)


def test_uni_lora_is_an_isometry_that_uses_every_number_equally_often(load):
    ours = installed(load(), "uni-lora")
    factors = [factor["default"] for _, layer in lora_layers(ours) for factor in (layer.lora_A, layer.lora_B)]
    vector = factors[0].vector
    assert all(factor.vector is vector for factor in factors)
    assert sum(factor.weight.square().sum() for factor in factors).item() == pytest.approx(
        vector.square().sum().item(), rel=1e-4
    )
    counts = torch.bincount(torch.cat([factor.places.flatten() for factor in factors]), minlength=500)
    assert counts.max() - counts.min() <= 1
    assert UniLoraModel.generate_index(int(counts.sum()), 500, 0).bincount().max() == counts.max()


def test_uni_lora_computes_what_peft_computes_with_the_same_vector_and_places(load):
    ours = installed(load(), "uni-lora")
    config = UniLoraConfig(r=4, theta_d_length=500, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    theirs = get_peft_model(load(), config)
    with torch.no_grad():
        for name, layer in lora_layers(ours):
            other = theirs.get_base_model().get_submodule(name)
            layer.lora_A["default"].vector.normal_()
            theirs.base_model.unilora_theta_d["default"].copy_(layer.lora_A["default"].vector[:, 0])
            for factor in "AB":
                mine = getattr(layer, f"lora_{factor}")["default"]
                getattr(other, f"unilora_indices_{factor}")["default"] = mine.places.long()
                getattr(other, f"unilora_scales_{factor}")["default"] = mine.shares
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-4)
    assert not torch.allclose(logits(ours), logits(load()), atol=1e-2)


def test_sizes_that_do_not_fit_the_model_are_refused(load):
    with pytest.raises(CoraError, match=r"--bank-length to divide the 64 inputs and 64 outputs of .*q_proj, which 24 does not"):
        installed(load(), "vb-lora", bank_length=24)
    with pytest.raises(CoraError, match="--theta-length must be at most 1792, the numbers in all A and B, not 1793"):
        installed(load(), "uni-lora", theta_length=1793)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "vb-lora", "bank_top": 4, "bank_vectors": 3}, "--bank-top must be at most the 3 vectors of the bank, not 4"),
        ({"mode": "vb-lora", "bank_ratio": 0.0}, r"--bank-ratio must be positive, not 0\.0"),
        ({"mode": "uni-lora", "theta_length": 0}, "--theta-length must be at least 1, not 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        TrainConfig(**{"model": "m", "dataset": "d", "output_dir": "o", **settings})
