import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from cora_cli.data.encode import Example
from cora_cli.data.pack import GHOST, IGNORED, ExampleSet, GlobalBatches, collate, pack, response_losses

VOCABULARY = 48
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
WINDOW = 4
CONFIGS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**COMMON)),
    "mistral": (MistralForCausalLM, MistralConfig(**COMMON, sliding_window=WINDOW)),
    # One layer with full attention, one with a window.
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config(
            **COMMON, use_sliding_window=True, sliding_window=WINDOW, layer_types=["full_attention", "sliding_attention"]
        ),
    ),
}
repeatable = settings(derandomize=True, deadline=None, max_examples=12)
# Prompt and response lengths of the documents of one row.
rows = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def models():
    """Every architecture in float64; "sdpa" is also the reference for padded batches."""
    made = {}
    for name, (kind, config) in CONFIGS.items():
        torch.manual_seed(0)
        made[name] = kind(config).double()
    return made


def make_examples(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        Example(torch.randint(VOCABULARY, (prompt + response,), generator=generator).tolist(), prompt)
        for prompt, response in lengths
    ]


def padded(examples):
    """The ordinary form: rows padded on the right, labels -100 on prompts and padding."""
    longest = max(len(example.input_ids) for example in examples)
    ids, labels, mask = [], [], []
    for example in examples:
        gap = longest - len(example.input_ids)
        ids.append(example.input_ids + [0] * gap)
        labels.append([-100] * example.prompt_length + example.input_ids[example.prompt_length :] + [-100] * gap)
        mask.append([1] * len(example.input_ids) + [0] * gap)
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)}


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_close(found, expected):
    """Largest difference below 1e-5 of the largest entry."""
    for name, wanted in expected.items():
        assert (found[name] - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name


def loss_and_gradients(model, attention, batch):
    model.set_attn_implementation(attention)
    is_packed = "position_ids" in batch
    loss = response_losses(model, batch)[0].mean() if is_packed else model(**batch, use_cache=False).loss
    return loss.item(), gradients(model, loss)


@pytest.mark.parametrize("attention", ["cora_packed", "sdpa"])
@pytest.mark.parametrize("architecture", CONFIGS)
@given(lengths=rows)
@repeatable
def test_a_packed_row_has_loss_and_gradients_of_the_padded_batch(attention, architecture, lengths, models):
    model, examples = models[architecture], make_examples(lengths)
    expected_loss, expected = loss_and_gradients(model, "sdpa", padded(examples))
    loss, found = loss_and_gradients(model, attention, pack(examples))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_close(found, expected)


@pytest.mark.parametrize("architecture", ["mistral", "qwen2"])
def test_the_window_is_narrower_than_a_document_and_matters(architecture, models):
    model, batch = models[architecture], pack(make_examples([(8, 12), (3, 2)]))
    model.set_attn_implementation("cora_packed")
    windowed = response_losses(model, batch)[0]
    layers = [layer.self_attn for layer in model.model.layers]
    kept = [getattr(layer, "sliding_window", None) for layer in layers]
    try:
        model.config.sliding_window = 200
        for layer, window in zip(layers, kept, strict=True):
            if window is not None:
                layer.sliding_window = 200
        assert not torch.allclose(response_losses(model, batch)[0], windowed)
    finally:
        model.config.sliding_window = WINDOW
        for layer, window in zip(layers, kept, strict=True):
            if window is not None:
                layer.sliding_window = window


def test_the_conftest_model_gives_the_same_loss_packed_and_padded(tiny_model):
    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    examples = make_examples([(5, 3), (2, 9), (7, 1)])
    expected_loss, expected = loss_and_gradients(model, "sdpa", padded(examples))
    loss, found = loss_and_gradients(model, "cora_packed", pack(examples))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_close(found, expected)


def test_without_boundaries_packed_attention_is_ordinary_sdpa(models):
    model, batch = models["llama"], padded(make_examples([(3, 4), (6, 5)]))
    batch.pop("labels")
    logits = {}
    for attention in ("sdpa", "cora_packed"):
        model.set_attn_implementation(attention)
        logits[attention] = model(**batch).logits[batch["attention_mask"].bool()]
    assert torch.allclose(logits["sdpa"], logits["cora_packed"], rtol=0, atol=1e-12)


@given(lengths=rows)
@repeatable
def test_the_row_holds_each_document_its_positions_its_boundaries_and_labels_on_responses_only(lengths):
    examples = make_examples(lengths)
    row = pack(examples)
    bounds = row["cu_seq_lens_q"].tolist()
    assert row["cu_seq_lens_q"].dtype == torch.int32
    assert torch.equal(row["cu_seq_lens_q"], row["cu_seq_lens_k"])
    assert row["max_length_q"] == row["max_length_k"] == max(len(example.input_ids) for example in examples)
    for example, (start, end) in zip(examples, itertools.pairwise(bounds), strict=True):
        assert row["input_ids"][0, start:end].tolist() == example.input_ids
        assert row["position_ids"][0, start:end].tolist() == list(range(end - start))
        assert row["labels"][0, start : start + example.prompt_length].eq(IGNORED).all()
        assert row["labels"][0, start + example.prompt_length : end].tolist() == example.input_ids[example.prompt_length :]
    assert bounds[-1] == row["input_ids"].numel() == row["labels"].numel() == row["position_ids"].numel()


def test_logits_are_computed_at_the_tokens_before_a_label_and_nowhere_else(models):
    model = models["llama"]
    model.set_attn_implementation("cora_packed")
    shapes = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    try:
        losses, positions = response_losses(model, pack(make_examples([(3, 2), (5, 4)])))
    finally:
        hook.remove()
    assert shapes == [(1, 6, VOCABULARY)]
    assert losses.shape == (6,)
    assert losses.dtype == torch.float32
    assert positions.tolist() == [2, 3, 9, 10, 11, 12]


@pytest.mark.parametrize("attention", ["cora_packed", "sdpa"])
def test_a_ghost_adds_neither_loss_nor_gradient(attention, models):
    model, (real, ghost) = models["llama"], make_examples([(4, 5), (2, 3)])
    alone = loss_and_gradients(model, attention, pack([real]))
    loss, found = loss_and_gradients(model, attention, pack([real, ghost], [False, True]))
    assert loss == pytest.approx(alone[0], rel=1e-6)
    assert_close(found, alone[1])


@pytest.mark.parametrize("attention", ["cora_packed", "sdpa"])
def test_a_row_of_ghosts_alone_has_zero_loss_and_zero_gradients_for_every_parameter(attention, models):
    model = models["llama"]
    model.set_attn_implementation(attention)
    losses, positions = response_losses(model, pack(make_examples([(2, 3)]), [True]))
    assert losses.numel() == positions.numel() == 0
    # The gradients must exist: a process without them would leave the others waiting in the all-reduce.
    assert all(gradient.eq(0).all() for gradient in gradients(model, losses.sum()).values())


def test_the_ghost_of_a_set_is_its_shortest_example_without_labels():
    examples = make_examples([(4, 4), (1, 2), (3, 3)])
    data = ExampleSet(examples)
    assert len(data) == 3
    assert data[0] == (examples[0], False)
    assert data[GHOST] == (examples[1], True)
    row = collate([data[GHOST]])
    assert row["input_ids"][0].tolist() == examples[1].input_ids
    assert row["labels"].eq(IGNORED).all()


def dealt(count, batch_size, accumulation, world, seed, epoch):
    """Per process, its micro-batches."""
    processes = []
    for rank in range(world):
        batches = GlobalBatches(count, batch_size, accumulation, rank, world, seed)
        batches.set_epoch(epoch)
        processes.append(list(batches))
        assert len(batches) == len(processes[-1])
    return processes


@given(
    count=st.integers(1, 60),
    batch_size=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    world=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 5),
)
@settings(derandomize=True, deadline=None, max_examples=80)
def test_every_world_size_and_accumulation_trains_on_the_optimizer_batches_of_one_process(
    count, batch_size, accumulation, world, seed, epoch
):
    size = batch_size * accumulation * world
    reference = [set(batch) for batch in dealt(count, size, 1, 1, seed, epoch)[0]]
    processes = dealt(count, batch_size, accumulation, world, seed, epoch)
    assert {len(batches) for batches in processes} == {len(reference) * accumulation}, "all processes are in step"
    for step, expected in enumerate(reference):
        micro = slice(step * accumulation, (step + 1) * accumulation)
        members = [index for batches in processes for part in batches[micro] for index in part]
        assert all(0 < len(part) <= batch_size for batches in processes for part in batches[micro])
        real = [index for index in members if index != GHOST]
        assert set(real) == expected
        assert len(real) == len(expected)
    everything = [index for batches in processes for part in batches for index in part if index != GHOST]
    assert sorted(everything) == list(range(count))


def test_the_order_depends_on_seed_and_epoch_alone():
    one = dealt(50, 4, 1, 1, seed=1, epoch=0)
    assert one == dealt(50, 4, 1, 1, seed=1, epoch=0)
    assert one != dealt(50, 4, 1, 1, seed=1, epoch=1)
    assert one != dealt(50, 4, 1, 1, seed=2, epoch=0)


def test_a_short_last_batch_is_dealt_out_evenly_and_the_rest_gets_ghosts():
    processes = dealt(9, 2, 1, 4, seed=0, epoch=0)
    assert sorted(len(batches[-1]) for batches in processes) == [1, 1, 1, 1]
    assert [batches[-1] for batches in processes].count([GHOST]) == 3


@pytest.mark.parametrize(("batch_size", "accumulation", "world"), [(2, 2, 3), (3, 1, 4), (1, 4, 3)])
def test_the_gradient_of_an_epoch_dealt_over_processes_is_that_of_one_process(batch_size, accumulation, world, models):
    model, examples = models["llama"], make_examples([(1 + n % 4, 1 + n % 5) for n in range(14)])
    model.set_attn_implementation("cora_packed")

    def total(batches):
        loader = DataLoader(ExampleSet(examples), batch_sampler=batches, collate_fn=collate)
        return sum(response_losses(model, row)[0].sum() for row in loader)

    whole = total(GlobalBatches(14, 14, 1, 0, 1, seed=3))
    parts = sum(total(GlobalBatches(14, batch_size, accumulation, rank, world, seed=3)) for rank in range(world))
    assert_close(gradients(model, parts), gradients(model, whole))
