"""Packed rows against what they stand for: a dense mask made from the documents, and the padded batch in stock transformers."""

import dataclasses
import inspect
from contextlib import contextmanager

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch.nn import functional
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.varlen import varlen_attn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.integrations import flex_attention as transformers_flex
from transformers.masking_utils import eager_mask

from cora_cli.data import pack as packing
from cora_cli.data.encode import Example
from cora_cli.data.pack import lay_out, pack
from cora_cli.errors import CoraError
from cora_cli.training import attention
from cora_cli.training.attention import (
    block_mask_attention,
    layout_block_mask,
    layout_mask,
    register_packed_attention,
    segment_attention,
    varlen_attention,
)
from cora_cli.training.losses import response_losses

VOCABULARY = 48
WINDOW = 4
CPU = torch.device("cpu")
# Sequences that begin like one of two stems, so that they share prefixes, continue one another or are the same.
STEMS = ([1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3], [1, 2, 3, 1, 4, 4, 4, 4, 4, 4])
beginnings = st.tuples(st.sampled_from(STEMS), st.integers(0, 12)).map(lambda drawn: drawn[0][: drawn[1]])
sequences = st.tuples(beginnings, st.lists(st.integers(1, 5), min_size=2, max_size=6)).map(lambda drawn: drawn[0] + drawn[1])
rows = st.lists(sequences, min_size=1, max_size=5)
windows = st.sampled_from([None, 1, WINDOW])
repeatable = settings(derandomize=True, deadline=None, max_examples=40)


@contextmanager
def setup(shortest_shared=2, longest_piece=128):
    """Rows that share short prefixes, and segments that are cut into short pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SHORTEST_SHARED", shortest_shared)
        patch.setattr(attention, "LONGEST_PIECE", longest_piece)
        attention.pieces.cache_clear()
        yield
    attention.pieces.cache_clear()


# Against a dense mask


def dense_mask(documents, shortest_shared, window):
    """Which token of the row sees which, document by document, and the layout of these documents: (tokens, tokens) bool."""
    layout, paths = lay_out(documents, shortest_shared)
    seen = torch.zeros(layout.tokens, layout.tokens, dtype=torch.bool)
    for path in paths:
        places = [place for index in path for place in range(layout.segments[index].start, layout.segments[index].end)]
        for late, query in enumerate(places):
            for early, key in enumerate(places[: late + 1]):
                seen[query, key] = window is None or late - early < window
    return seen, layout


def dense_attention(query, key, value, seen, scale, softcap):
    """Softmax attention written out: (1, heads, tokens, head_dim) to (1, tokens, heads, head_dim)."""
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2)


def make_inputs(tokens, heads, key_value_heads, dtype=torch.float64, head_dim=8):
    """Query, key and value, strided as they come from a projection."""
    generator = torch.Generator().manual_seed(tokens)
    counts = (heads, key_value_heads, key_value_heads)
    made = [torch.randn(1, tokens, count, head_dim, generator=generator, dtype=torch.float64) for count in counts]
    return [tensor.to(dtype).transpose(1, 2).requires_grad_() for tensor in made]


def output_and_gradients(function, inputs):
    """What a form of attention gives, and the gradients where every output counts differently."""
    output = function(*inputs)
    upstream = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).sin().reshape(output.shape)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream.to(output.dtype))]


@given(
    documents=rows,
    shortest=st.sampled_from([1, 2, 4, None]),
    window=windows,
    heads=st.sampled_from([(4, 2), (3, 3), (4, 1)]),
    longest_piece=st.sampled_from([1, 3, 128]),
    softcap=st.sampled_from([None, 1.5]),
    scale=st.sampled_from([None, 0.7]),
)
@repeatable
def test_outputs_and_gradients_are_those_of_dense_attention(documents, shortest, window, heads, longest_piece, softcap, scale):
    seen, layout = dense_mask(documents, shortest, window)
    inputs = make_inputs(layout.tokens, *heads)

    def by_segments(query, key, value):
        arguments = {"scaling": scale, "sliding_window": window, "softcap": softcap}
        return segment_attention(torch.nn.Module(), query, key, value, None, layout, **arguments)[0]

    expected = output_and_gradients(lambda *qkv: dense_attention(*qkv, seen, scale or 8**-0.5, softcap), inputs)
    with setup(longest_piece=longest_piece):
        found = output_and_gradients(by_segments, inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def varlen_reference(query, key, value, query_ends, key_ends, most_queries, most_keys, scale, window_size):
    """What torch's `varlen_attn` documents, written out: in each sequence the last query sees the last key, and the others go before."""
    found, (left, right) = [], window_size
    assert right == 0
    lengths = [ends.diff().tolist() for ends in (query_ends, key_ends)]
    assert (max(lengths[0]), max(lengths[1])) == (most_queries, most_keys)
    sequences = zip(query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True)
    for queries, keys, values in sequences:
        behind = torch.arange(len(keys) - len(queries), len(keys))[:, None] - torch.arange(len(keys))
        seen = (behind >= 0) & ((behind <= left) if left >= 0 else True)
        inputs = (tensor.transpose(0, 1)[None] for tensor in (queries, keys, values))
        found.append(dense_attention(*inputs, seen, scale or query.shape[-1] ** -0.5, None)[0])
    return torch.cat(found)


@given(documents=rows, shortest=st.sampled_from([1, 2, 4, None]), window=windows, scale=st.sampled_from([None, 0.7]))
@repeatable
def test_the_sequences_for_torchs_kernel_are_the_layout(documents, shortest, window, scale):
    seen, layout = dense_mask(documents, shortest, window)
    inputs = make_inputs(layout.tokens, 4, 2)

    def by_sequences(query, key, value):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "KERNEL_TYPES", (torch.float64,))
            patch.setattr(attention, "_varlen_kernel", lambda: varlen_reference)
            arguments = {"scaling": scale, "sliding_window": window}
            return varlen_attention(torch.nn.Module(), query, key, value, None, layout, **arguments)[0]

    expected = output_and_gradients(lambda *qkv: dense_attention(*qkv, seen, scale or 8**-0.5, None), inputs)
    for one, other in zip(output_and_gradients(by_sequences, inputs), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "extra"),
    [
        (torch.float32, 8, {}),
        (torch.bfloat16, 12, {}),
        (torch.bfloat16, 264, {}),
        (torch.bfloat16, 8, {"softcap": 1.5}),
        (torch.bfloat16, 8, {"s_aux": torch.zeros(4)}),
    ],
)
def test_what_torchs_kernel_does_not_compute_is_left_to_flex_attention(dtype, head_dim, extra, monkeypatch):
    called = []
    monkeypatch.setattr(attention, "block_mask_attention", lambda *arguments, **named: called.append(named))
    layout = lay_out([[1, 2, 3, 4]], None)[0]
    inputs = make_inputs(4, 4, 2, dtype, head_dim)
    varlen_attention(torch.nn.Module(), *inputs, None, layout, scaling=0.5, **extra)
    assert called == [{"scaling": 0.5, **extra}]


def test_torchs_kernel_has_the_arguments_that_are_used():
    arguments = inspect.signature(varlen_attn).parameters
    assert list(arguments)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size", "enable_gqa"} <= set(arguments)


@pytest.mark.parametrize("longest_piece", [16, 128])
def test_bfloat16_is_as_exact_as_its_rounding(longest_piece):
    stem = list(range(40))
    seen, layout = dense_mask([stem + [90] * 30, stem + [91] * 20, [92] * 25], 16, None)
    inputs = make_inputs(layout.tokens, 4, 2, torch.bfloat16, head_dim=32)
    inputs[0] = (inputs[0] * 4).detach().requires_grad_()
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]

    def by_segments(query, key, value):
        return segment_attention(torch.nn.Module(), query, key, value, None, layout)[0]

    exact = output_and_gradients(lambda *qkv: dense_attention(*qkv, seen, 32**-0.5, None), wide)
    with setup(longest_piece=longest_piece):
        found = output_and_gradients(by_segments, inputs)
    assert {tensor.dtype for tensor in found} == {torch.bfloat16}
    # Weights and outputs are rounded to 8 bits, each by 2^-8 at most, and scores are not, which here go up to 20.
    magnitude = dense_attention(wide[0], wide[1], wide[2].abs(), seen, 32**-0.5, None)
    assert ((found[0] - exact[0]).abs() <= 2**-7 * magnitude).all()
    for gradient, wanted in zip(found[1:], exact[1:], strict=True):
        assert (gradient - wanted).norm() <= 2**-7 * wanted.norm()


def test_autocast_does_not_lower_the_precision_of_the_inputs():
    layout = lay_out([[1, 2, 3, 4]], 1)[0]
    inputs = make_inputs(4, 2, 1, torch.float32)
    plain = segment_attention(torch.nn.Module(), *inputs, None, layout)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = segment_attention(torch.nn.Module(), *inputs, None, layout)[0]
    assert torch.equal(under_autocast, plain)


def test_the_form_for_gpus_refuses_dropout_in_the_same_words():
    inputs = make_inputs(4, 2, 1)
    with pytest.raises(CoraError, match="has dropout, which packed rows do not support"):
        block_mask_attention(torch.nn.Module(), *inputs, None, lay_out([[1, 2, 3, 4]], None)[0], dropout=0.1)


@pytest.mark.parametrize("extra", [{"dropout": 0.1}, {"s_aux": torch.zeros(2)}, {"position_bias": torch.zeros(2, 4, 4)}])
def test_what_it_cannot_compute_is_refused(extra):
    layout = lay_out([[1, 2, 3, 4]], 1)[0]
    with pytest.raises(CoraError, match=r"has (dropout|sinks or a position bias), which packed rows do not support"):
        segment_attention(torch.nn.Module(), *make_inputs(4, 2, 1), None, layout, **extra)


# Whole models against padded batches


COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 256,
}
MIXED = {"sliding_window": WINDOW, "layer_types": ["full_attention", "sliding_attention"]}
CAPS = {"head_dim": 8, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A small model, and the attention of transformers that computes its padded batches in float64."""

    kind: type
    config: object
    stock: str = "sdpa"


ARCHITECTURES = {
    "llama": Architecture(LlamaForCausalLM, LlamaConfig(**COMMON)),
    "mistral": Architecture(MistralForCausalLM, MistralConfig(**COMMON, sliding_window=WINDOW)),
    "qwen2": Architecture(Qwen2ForCausalLM, Qwen2Config(**COMMON, **MIXED, use_sliding_window=True)),
    # Stock attention with a soft cap takes its softmax in float32, so the reference is our own, with the stock mask.
    "gemma2": Architecture(Gemma2ForCausalLM, Gemma2Config(**COMMON, **MIXED, **CAPS), stock="dense"),
}


def masked_attention(module, query, key, value, mask, scaling, softcap=None, **kwargs):
    """In the form of transformers. Padding may see nothing, of which there is no softmax; it may then see all."""
    seen = mask == 0
    return dense_attention(query, key, value, seen | ~seen.any(-1, keepdim=True), scaling, softcap), None


@pytest.fixture(scope="module")
def models():
    """Every architecture in float64, norms included, which transformers computes in float32."""
    register_packed_attention()
    AttentionInterface.register("dense", masked_attention)
    AttentionMaskInterface.register("dense", eager_mask)
    made = {}
    for name, architecture in ARCHITECTURES.items():
        torch.manual_seed(0)
        model = architecture.kind(architecture.config)
        for place, norm in list(model.named_modules()):
            if type(norm).__name__.endswith("RMSNorm"):
                exact = torch.nn.RMSNorm(norm.weight.shape, eps=1e-6)
                torch.nn.init.uniform_(exact.weight, 0.5, 1.5)
                model.set_submodule(place, exact)
        made[name] = model.double()
    return made


@st.composite
def batches(draw):
    """Examples with at least one prompt and one response token each."""
    return [Example(ids, draw(st.integers(1, len(ids) - 1))) for ids in draw(rows)]


def padded_losses(model, examples):
    """The ordinary form, padded on the right: the loss of every response token, example after example."""
    longest = max(len(shown.input_ids) for shown in examples)
    gaps = [longest - len(shown.input_ids) for shown in examples]
    ids = torch.tensor([shown.input_ids + [0] * gap for shown, gap in zip(examples, gaps, strict=True)])
    mask = torch.tensor([[1] * (longest - gap) + [0] * gap for gap in gaps])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    found = []
    for row, shown in enumerate(examples):
        start, end = shown.prompt_length, len(shown.input_ids)
        found.append(functional.cross_entropy(logits[row, start - 1 : end - 1], ids[row, start:end], reduction="none"))
    return torch.cat(found)


def losses_and_gradients(model, attention_name, compute):
    """All losses, and the gradient of every parameter where each loss counts differently."""
    model.set_attn_implementation(attention_name)
    model.zero_grad(set_to_none=True)
    losses = compute(model)
    losses.backward(torch.linspace(0.5, 1.5, len(losses), dtype=losses.dtype))
    return {"losses": losses.detach()} | {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(found, expected, tolerance=1e-9):
    """Differences are below `tolerance` of the tensor's largest entry; one that should be zero is so to rounding."""
    rounding = 1e-3 * tolerance * max(tensor.abs().max() for tensor in expected.values())
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (found[name] - wanted).abs().max() <= tolerance * wanted.abs().max() + rounding, name


STEM = STEMS[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@given(examples=batches(), longest_piece=st.sampled_from([3, 128]))
@example(examples=[Example(STEM, 5)] * 3, longest_piece=3)
@example(examples=[Example([*STEM, 5], 2), Example([*STEM, 4], 12), Example(STEM[:7], 6)], longest_piece=3)
@settings(repeatable, max_examples=30)
def test_a_row_with_shared_prefixes_has_losses_and_gradients_of_the_padded_batch(architecture, examples, longest_piece, models):
    model, stock = models[architecture], ARCHITECTURES[architecture].stock
    with setup(longest_piece=longest_piece):
        row = pack(examples)
        found = losses_and_gradients(model, "cora_segments", lambda model: response_losses(model, row))
    assert_same(found, losses_and_gradients(model, stock, lambda model: padded_losses(model, examples)))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2"])
@given(examples=batches())
@settings(repeatable, max_examples=20)
def test_a_row_without_sharing_in_stock_attention_has_losses_and_gradients_of_the_padded_batch(architecture, examples, models):
    model, row = models[architecture], pack(examples, share_prefixes=False)
    found = losses_and_gradients(model, "sdpa", lambda model: response_losses(model, row))
    assert_same(found, losses_and_gradients(model, "sdpa", lambda model: padded_losses(model, examples)))


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_a_ghost_adds_neither_loss_nor_gradient(share_prefixes, models):
    model, name = models["llama"], "cora_segments" if share_prefixes else "sdpa"
    real, ghost = Example([*STEM, 5, 6], 4), Example([*STEM[:9], 7, 8], 3)
    with setup():
        alone = losses_and_gradients(model, name, lambda model: response_losses(model, pack([real], None, share_prefixes)))
        row = pack([real, ghost], [False, True], share_prefixes)
        found = losses_and_gradients(model, name, lambda model: response_losses(model, row))
    assert row["input_ids"].numel() == (16 if share_prefixes else 25)
    assert_same(found, alone)


def test_a_model_in_training_whose_attention_has_dropout_is_refused():
    model = LlamaForCausalLM(LlamaConfig(**COMMON, attention_dropout=0.1)).train()
    register_packed_attention()
    model.set_attn_implementation("cora_segments")
    with pytest.raises(CoraError, match="dropout"):
        response_losses(model, pack([Example([1, 2, 3], 1)]))


# The form for GPUs


@given(documents=rows, shortest=st.sampled_from([1, 2, 4, None]), window=windows)
@repeatable
def test_the_mask_of_a_layout_is_the_dense_mask_of_its_documents(documents, shortest, window):
    seen, layout = dense_mask(documents, shortest, window)
    place = torch.arange(layout.tokens)
    nothing = torch.tensor(0)
    assert torch.equal(layout_mask(layout, window, CPU)(nothing, nothing, place[:, None], place[None]), seen)
    mask = layout_block_mask(layout, window, CPU)
    assert mask.shape[-2:] == (layout.tokens, layout.tokens)
    assert torch.equal(mask.mask_mod(nothing, nothing, place[:, None], place[None]), seen)


@pytest.mark.parametrize("window", [None, 100])
def test_the_block_mask_skips_exactly_the_blocks_in_which_no_token_sees_another(window):
    stem = [1] * 200
    seen, layout = dense_mask([stem + [2] * 150, stem + [3] * 90, [4] * 170], 16, window)
    mask = layout_block_mask(layout, window, CPU)
    rows_of_blocks, columns_of_blocks = mask.BLOCK_SIZE
    blocks = [[part.any().item() for part in row.split(columns_of_blocks, 1)] for row in seen.split(rows_of_blocks)]
    assert mask.to_dense()[0, 0].bool().tolist() == blocks
    assert not all(map(all, blocks))


@pytest.fixture
def uncompiled(monkeypatch):
    """FlexAttention as plain torch operations: compiling it takes long and needs a C compiler."""
    monkeypatch.setattr(transformers_flex, "WrappedFlexAttention", lambda training: lambda: torch_flex.flex_attention)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def test_rows_of_all_layouts_and_lengths_share_two_compilations(monkeypatch):
    """The first row is compiled for its shape, the second for any; compiled without code generation, which needs a C compiler."""
    torch._dynamo.reset()
    compiled = torch.compile(torch_flex.flex_attention, backend="aot_eager")
    monkeypatch.setattr(transformers_flex, "WrappedFlexAttention", lambda training: lambda: compiled)
    counters.clear()
    for number in range(20):
        stem = [1] * (40 + number)
        layout = lay_out(
            [stem + [2] * (50 + 7 * number), *([3 + other] * (30 + 11 * other) for other in range(1 + number % 5))], 16
        )[0]
        inputs = [tensor.detach() for tensor in make_inputs(layout.tokens, 4, 2, torch.float32, head_dim=16)]
        with torch.no_grad():
            found = block_mask_attention(torch.nn.Module(), *inputs, None, layout, scaling=0.25)[0]
            expected = segment_attention(torch.nn.Module(), *inputs, None, layout, scaling=0.25)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize(("heads", "softcap"), [((4, 2), None), ((6, 3), 1.5)])
def test_both_forms_give_the_same_outputs(heads, softcap, window, uncompiled):
    stem = [1] * 60
    layout = lay_out([stem + [2] * 50, stem + [3] * 40, [4] * 35], 16)[0]
    inputs = [tensor.detach() for tensor in make_inputs(layout.tokens, *heads, head_dim=16)]
    module, arguments = torch.nn.Module(), {"scaling": 0.4, "sliding_window": window, "softcap": softcap, "dropout": 0.0}
    expected = segment_attention(module, *inputs, None, layout, **arguments)[0]
    found = block_mask_attention(module, *inputs, None, layout, **arguments)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", [segment_attention, block_mask_attention])
def test_queries_and_keys_take_the_precision_of_the_values(form, uncompiled):
    layout = lay_out([[1, 2, 3, 4]], 1)[0]
    query, key, value = (tensor.detach() for tensor in make_inputs(4, 2, 1, torch.bfloat16, head_dim=32))
    expected = form(torch.nn.Module(), query, key, value, None, layout)[0]
    found = form(torch.nn.Module(), query.float(), key.float(), value, None, layout)[0]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_has_the_same_losses_in_both_forms(architecture, uncompiled, models):
    model, examples = models[architecture], [Example([*STEM, 5, 6], 4), Example([*STEM[:9], 7, 8], 3), Example([9, 8, 7], 1)]
    with setup(), torch.no_grad():
        row, found = pack(examples), {}
        for name in ("cora_segments", "cora_flex"):
            model.set_attn_implementation(name)
            found[name] = response_losses(model, row)
    torch.testing.assert_close(found["cora_flex"], found["cora_segments"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("window", [None, 48, 300])
@pytest.mark.parametrize("shared", [16, None])
def test_the_block_mask_is_the_one_that_torch_makes_from_all_pairs_of_tokens(shared, window):
    stem = [1] * 300
    layout = lay_out([stem + [2] * 400, stem + [3] * 90, [4] * 170, [5] * 7], shared)[0]
    found = layout_block_mask(layout, window, CPU)
    expected = torch_flex.create_block_mask(
        layout_mask(layout, window, CPU), None, None, layout.tokens, layout.tokens, device="cpu"
    )
    for found_part, part in zip(found.as_tuple()[:-1], expected.as_tuple()[:-1], strict=True):  # without the mask function
        assert torch.equal(found_part, part) if torch.is_tensor(part) else found_part == part
