import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from cora_cli.data.batches import GHOST, BatchForm, Collator, ExampleSet, GlobalBatches
from cora_cli.data.encode import Example
from cora_cli.training.attention import register_packed_attention
from cora_cli.training.losses import batch_losses

VOCABULARY = 48


def make_examples(lengths):
    """Random examples with these prompt and response lengths."""
    generator = torch.Generator().manual_seed(0)
    return [
        Example(torch.randint(VOCABULARY, (prompt + response,), generator=generator).tolist(), prompt)
        for prompt, response in lengths
    ]


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_the_ghost_of_a_set_is_its_shortest_example_without_labels(share_prefixes):
    examples = make_examples([(4, 4), (1, 2), (3, 3)])
    data = ExampleSet(examples)
    assert len(data) == 3
    assert data[0] == (examples[0], False)
    assert data[GHOST] == (examples[1], True)
    batch = Collator(BatchForm("packed", share_prefixes))([data[GHOST]])
    assert batch["passes"][0]["input_ids"][0].tolist() == examples[1].input_ids
    assert batch["labels"].numel() == batch["real_tokens"] == 0


def test_the_collator_shares_prefixes_where_it_is_told_to():
    stem = list(range(20))
    items = [(Example([*stem, 30], 20), False), (Example([*stem, 31, 32], 20), False)]
    shared, unshared = (Collator(BatchForm("packed", shares))(items) for shares in (True, False))
    assert shared["passes"][0]["input_ids"].shape == (1, 23)
    assert unshared["passes"][0]["input_ids"].shape == (1, 43)
    assert shared["labels"].tolist() == unshared["labels"].tolist() == [30, 31, 32]


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


FORMS = {
    "packed, sharing prefixes": BatchForm("packed", True),
    "packed": BatchForm("packed"),
    "packed on two sides of a length": BatchForm("packed", switch=5),
    "padded": BatchForm("padded", arguments=frozenset({"attention_mask", "logits_to_keep", "use_cache"})),
    "padded without any argument": BatchForm("padded"),
    "single": BatchForm("single", arguments=frozenset({"logits_to_keep"})),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("batch_size", "accumulation", "world"), [(2, 2, 3), (3, 1, 4), (1, 4, 3)])
def test_the_gradient_of_an_epoch_dealt_over_processes_is_that_of_one_process(batch_size, accumulation, world, form):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.3, **sizes)).double()
    register_packed_attention()
    examples = make_examples([(1 + n % 4, 1 + n % 5) for n in range(14)])

    def gradients(parts, form):
        model.set_attn_implementation("cora_segments" if form.shares_prefixes else "sdpa")
        collator = Collator(form)
        model.zero_grad(set_to_none=True)
        for batches in parts:
            for batch in DataLoader(ExampleSet(examples), batch_sampler=batches, collate_fn=collator):
                batch_losses(model, batch).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    whole = gradients([GlobalBatches(14, 14, 1, 0, 1, seed=3)], FORMS["packed, sharing prefixes"])
    dealt_out = gradients(
        [GlobalBatches(14, batch_size, accumulation, rank, world, seed=3) for rank in range(world)], FORMS[form]
    )
    for name, wanted in whole.items():
        # Norms compute in float32 whatever the model's dtype is.
        assert (dealt_out[name] - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name


def test_examples_on_both_sides_of_a_length_never_share_a_pass():
    examples = make_examples([(3, 4), (2, 3), (4, 4), (1, 1)])
    for kind in ("packed", "padded"):
        assert BatchForm(kind, switch=6).passes(examples) == [[1, 3], [0, 2]]
        assert BatchForm(kind).passes(examples) == [[0, 1, 2, 3]]
    assert BatchForm("single", switch=6).passes(examples) == [[0], [1], [2], [3]]
