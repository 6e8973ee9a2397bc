"""`token_losses` against torch's cross-entropy, and how many logits `response_losses` asks a model for."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from cora_cli.data.encode import Example
from cora_cli.data.pack import pack
from cora_cli.training import losses as module
from cora_cli.training.attention import register_packed_attention
from cora_cli.training.losses import response_losses, token_losses

repeatable = settings(derandomize=True, deadline=None, max_examples=30)


def make_logits(tokens, vocabulary, dtype=torch.float64):
    """Logits as far apart as a trained model's, and targets."""
    generator = torch.Generator().manual_seed(tokens * 1000 + vocabulary)
    logits = torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64) * 8
    return logits.to(dtype), torch.randint(vocabulary, (tokens,), generator=generator)


def gradient_of(function, logits, targets):
    """Losses and their gradient where every loss counts differently."""
    leaf = logits.clone().requires_grad_()
    found = function(leaf, targets)
    found.backward(torch.linspace(-1.0, 2.0, len(found), dtype=found.dtype))
    return found.detach(), leaf.grad


@given(tokens=st.integers(0, 12), vocabulary=st.integers(1, 40), chunk=st.sampled_from([1, 7, 80, 1 << 20]))
@repeatable
def test_losses_and_gradient_are_those_of_cross_entropy_for_every_chunk(tokens, vocabulary, chunk):
    logits, targets = make_logits(tokens, vocabulary)
    expected, slope = gradient_of(lambda *given: functional.cross_entropy(*given, reduction="none"), logits, targets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        found, gradient = gradient_of(token_losses, logits, targets)
    assert found.dtype == gradient.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-12, atol=1e-14)


def test_losses_of_bfloat16_logits_are_those_of_the_same_logits_in_float32():
    logits, targets = make_logits(9, 300, torch.bfloat16)
    found, gradient = gradient_of(token_losses, logits, targets)
    expected, slope = gradient_of(token_losses, logits.float(), targets)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert gradient.dtype == torch.bfloat16
    # Two roundings to 8 bits, of the slope and of its product with what arrives.
    assert ((gradient.float() - slope).abs() <= 2**-7 * slope.abs()).all()


def test_logits_whose_exponentials_overflow_have_the_right_losses_and_gradient():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], dtype=torch.float64)
    found, gradient = gradient_of(token_losses, logits, torch.tensor([1, 2]))
    torch.testing.assert_close(found, torch.tensor([2e4, math.log(3)], dtype=torch.float64), rtol=1e-9, atol=0)
    expected = torch.tensor([[-1.0, 1.0, 0.0], [2 / 3, 2 / 3, -4 / 3]], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=0)


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that is made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.elements = max(self.elements, made.numel())
        return made


@pytest.mark.parametrize("wanted", [True, False])
def test_the_gradient_is_made_only_where_it_is_wanted(wanted, monkeypatch):
    logits, targets = make_logits(40, 50)
    logits.requires_grad_(wanted)
    monkeypatch.setattr(module, "CHUNK", 100)
    with Largest() as largest:
        found = token_losses(logits, targets)
    assert found.requires_grad is wanted
    assert largest.elements == (40 * 50 if wanted else 2 * 50)


@pytest.fixture
def model():
    """A Llama with one layer, in float32."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=30, initializer_range=0.3, **sizes))
    register_packed_attention()
    made.set_attn_implementation("cora_segments")
    return made


def test_logits_are_computed_at_the_tokens_before_a_label_and_nowhere_else(model):
    shapes = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    found = response_losses(model, pack([Example([1, 2, 3, 4, 5], 3), Example([6, 7, 8, 9], 1)]))
    assert shapes == [(1, 2 + 3, 30)]
    assert found.shape == (5,)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_a_row_of_ghosts_alone_has_zero_loss_and_zero_gradients_for_every_parameter(share_prefixes, model):
    model.set_attn_implementation("cora_segments" if share_prefixes else "sdpa")
    found = response_losses(model, pack([Example([1, 2, 3], 1)], [True], share_prefixes))
    assert found.numel() == 0
    found.sum().backward()
    # The gradients must exist: a process without them would leave the others waiting in the all-reduce.
    assert all(parameter.grad.eq(0).all() for parameter in model.parameters())
