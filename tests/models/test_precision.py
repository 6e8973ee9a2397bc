import pytest
import torch

from cora_cli.models.precision import computing_in


def make_model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(7, 7), torch.nn.Linear(7, 7, bias=False)).bfloat16()
    model[1].weight = model[0].weight
    return model


def test_every_layer_computes_in_the_precision_and_keeps_its_weights() -> None:
    model, exact = make_model(), make_model().double()
    weight = model[0].weight
    before = weight.data
    with computing_in(model, torch.float64):
        assert torch.equal(model(torch.arange(7)), exact(torch.arange(7)))
    assert model[0].weight is model[1].weight is weight
    assert weight.data.data_ptr() == before.data_ptr()
    assert model(torch.arange(7)).dtype == torch.bfloat16


def test_weights_are_restored_where_a_layer_fails() -> None:
    model = make_model()
    with pytest.raises(IndexError), computing_in(model, torch.float64):
        model(torch.tensor([9]))
    assert model[0].weight.dtype == torch.bfloat16
    assert not any(module._forward_pre_hooks for module in model.modules())


class Remembering(torch.nn.Linear):
    """A layer that keeps a mask of the first pass, in its precision, for the others, as code of some models does."""

    first = True

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.first:
            self.first = False
            self.register_buffer("mask", torch.ones(7).to(inputs), persistent=False)
        assert self.mask.dtype == inputs.dtype
        return super().forward(inputs * self.mask)


def test_what_a_layer_keeps_of_a_pass_is_forgotten_with_its_precision() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(7, 7), Remembering(7, 7))
    for dtype in (torch.float64, torch.float32):
        with computing_in(model, dtype):
            assert model(torch.arange(7)).dtype == dtype
            model(torch.arange(7))
    assert model[1].first
    assert model(torch.arange(7)).dtype == torch.float32
