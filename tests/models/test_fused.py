"""The views of fused projections, each family against slices that are written out and against the model itself."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cora_cli.errors import CoraError
from cora_cli.models.fused import VIEWS, Layout, fused_views, join_projections, split_parts, split_projections
from tests.models.fused import FAMILY_SLICES, logits, model_of, weight_of

OUTPUTS = ("c_proj", "dense", "out_proj", "o_proj")


@pytest.mark.parametrize("family", FAMILY_SLICES)
def test_a_split_model_computes_the_same_with_the_rows_of_q_k_and_v_and_is_joined_again(family):
    model = model_of(family)
    called, rows = FAMILY_SLICES[family]
    places = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == called]
    assert len(places) == 2
    assert list(fused_views(model)) == [f"{name}.{part}" for name in places for part in VIEWS]
    before, expected = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {name: weight_of(model.get_submodule(name)).clone() for name in places}

    split_projections(model, VIEWS)
    assert list(split_parts(model)) == places
    for name in places:
        for number, part in enumerate(VIEWS):
            assert torch.equal(model.get_submodule(f"{name}.{part}").weight, rows(weights[name], number))
    assert (logits(model) - before).abs().max() <= 1e-6 * before.abs().max()

    join_projections(model)
    assert {name: tensor.tolist() for name, tensor in model.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in expected.items()
    }
    assert (logits(model) - before).abs().max() == 0


@pytest.mark.parametrize("family", FAMILY_SLICES)
def test_the_queries_keys_and_values_are_those_that_the_family_computes_attention_with(family):
    """Without queries every score is the same, as it is without keys; without values nothing reaches the output projection."""
    model = model_of(family)
    split_projections(model, VIEWS)
    name, layer = next(iter(split_parts(model).items()))
    output = next(module for other, module in model.get_submodule(name.rpartition(".")[0]).named_children() if other in OUTPUTS)

    @torch.no_grad()
    def inputs_of_output(zeroed: str | None) -> torch.Tensor:
        seen, kept = [], {key: tensor.clone() for key, tensor in layer.state_dict().items()}
        hook = output.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for key, parameter in layer.named_parameters():
            if key.split(".")[0] == zeroed:
                parameter.zero_()
        logits(model)
        layer.load_state_dict(kept)
        hook.remove()
        return seen[0]

    complete, no_queries, no_keys, no_values = (inputs_of_output(zeroed) for zeroed in (None, *VIEWS))
    assert (no_queries - no_keys).abs().max() <= 1e-6 * no_keys.abs().max()
    assert (complete - no_queries).abs().max() > 1e-4
    assert no_values.abs().max() == 0 < no_queries.abs().max()


def test_only_the_layers_that_are_named_are_split():
    model = model_of("gpt2")
    split_projections(model, ["transformer.h.1.attn.c_attn.k_proj", "c_proj"])
    assert list(split_parts(model)) == ["transformer.h.1.attn.c_attn"]
    split_projections(model, ["q_proj"])
    assert list(split_parts(model)) == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]


def test_a_projection_that_is_named_as_a_whole_and_by_its_parts_is_refused():
    with pytest.raises(CoraError, match=r"name 'c_attn' and also q_proj, k_proj or v_proj, which are rows of its one weight"):
        split_projections(model_of("gpt2"), ["q_proj", "c_attn"])


def test_attention_to_an_encoder_has_no_queries_in_its_fused_projection():
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16, add_cross_attention=True)
    assert {view.fused for view in fused_views(GPT2LMHeadModel(config)).values()} == {"transformer.h.0.attn.c_attn"}


def test_weights_in_other_types_are_refused():
    model = model_of("phi3")
    for layer in model.model.layers:
        layer.self_attn.qkv_proj.weight = torch.nn.Parameter(
            layer.self_attn.qkv_proj.weight.to(torch.float8_e4m3fn), requires_grad=False
        )
    with pytest.raises(
        CoraError, match=r"rows of model.layers.0.self_attn.qkv_proj in this model, which is held as float8_e4m3fn"
    ):
        split_projections(model, VIEWS)


def test_code_that_is_not_of_transformers_has_no_views(monkeypatch):
    model = model_of("gpt2")
    monkeypatch.setattr(type(model), "__module__", "transformers_modules.someone.modeling_gpt2")
    assert fused_views(model) == {}


def test_placed_factors_have_the_product_of_each_part_in_its_rows():
    layout, generator = Layout(2, (4, 2, 2)), torch.Generator().manual_seed(0)
    factors = {
        part: (torch.randn(layout.outputs_of(part), rank, generator=generator), torch.randn(rank, 5, generator=generator))
        for part, rank in (("v_proj", 1), ("q_proj", 3))
    }
    b, a = layout.place(factors)
    assert b.shape == (16, 4)
    for part in VIEWS:
        expected = factors[part][0] @ factors[part][1] if part in factors else torch.zeros(4, 5)
        assert torch.allclose(layout.rows(b @ a, part), expected, atol=1e-6)
