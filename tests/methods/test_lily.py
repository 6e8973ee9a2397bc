"""Why PEFT's Lily is no mode: what it computes for one sequence depends on the other sequences, on padding and on later tokens."""

import pytest
import torch
from peft import LilyConfig, LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from cora_cli.errors import CoraError
from cora_cli.methods.parts.peft_configuration import peft_configuration

TARGETS = ["q_proj", "v_proj"]
FIRST, OTHER = [1, 5, 9, 100, 7, 3, 2, 40], [44, 8, 300, 12, 950, 4, 77, 6]


def adapt(kind, base):
    """The tiny model in float64 with Lily or LoRA; all factors are random, as if trained."""
    common = {"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    config = LilyConfig(num_B=3, **common) if kind == "lily" else LoraConfig(**common)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base, dtype=torch.float64), config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lily_" in name or "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


@pytest.fixture(params=["lily", "lora"])
def adapted(request, tiny_model):
    """Lily and, for comparison, LoRA."""
    return request.param, adapt(request.param, tiny_model)


@torch.no_grad()
def logits(model, *rows, **more):
    return model(input_ids=torch.tensor(rows), **more).logits


def assert_moved(name, found, alone):
    """Lily's logits move by more than a hundredth of a nat, LoRA's by rounding only."""
    gap = float((found - alone).abs().max())
    assert gap > 0.01 if name == "lily" else gap < 1e-10


def test_another_sequence_in_the_batch_changes_a_sequence(adapted):
    name, model = adapted
    assert_moved(name, logits(model, FIRST, OTHER)[0], logits(model, FIRST)[0])


def test_padding_changes_a_sequence(adapted):
    name, model = adapted
    mask = torch.tensor([[1] * len(FIRST) + [0] * 8])
    assert_moved(name, logits(model, FIRST + [2] * 8, attention_mask=mask)[0, : len(FIRST)], logits(model, FIRST)[0])


def test_later_tokens_change_the_prediction_of_earlier_ones(adapted):
    """So that the loss over a sequence is not the negative logarithm of its probability: each token is predicted with itself in sight."""
    name, model = adapted
    assert_moved(name, logits(model, FIRST[:4] + OTHER[4:])[0, :4], logits(model, FIRST)[0, :4])


def test_generation_with_a_cache_is_another_function_than_without_one(adapted):
    name, model = adapted
    with torch.no_grad():
        past = model(input_ids=torch.tensor([FIRST[:-1]]), use_cache=True).past_key_values
    assert_moved(name, logits(model, FIRST[-1:], past_key_values=past)[0, -1], logits(model, FIRST)[0, -1])


def test_the_cause_is_a_router_averaged_over_every_token_of_the_forward_pass(tiny_model):
    layer = adapt("lily", tiny_model).base_model.model.model.layers[0].self_attn.q_proj
    a, router = layer.lily_A["default"].weight, layer.lily_router["default"].weight
    b = layer.lily_B["default"].weight.reshape(3, 4, 64)
    x = torch.randn(2, 5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    hidden = x @ a.T
    weights = (hidden @ router.T).softmax(-1)
    mixed = weights.mean(dim=(0, 1))  # over sequences and tokens
    expected = layer.base_layer(x) + hidden @ (mixed @ b.flatten(1)).view(4, 64)
    assert torch.allclose(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_it_is_refused_with_this_reason():
    with pytest.raises(
        CoraError,
        match=r"LILY weights its factors by a mean over all tokens of a batch, so that no loss or answer would be that of its record alone$",
    ):
        peft_configuration({"peft_type": "LILY"}, 4)
