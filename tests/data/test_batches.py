import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from cora_cli.data.batches import GHOST, Collator, ExampleSet, GlobalBatches
from cora_cli.data.encode import Example
from cora_cli.training.attention import register_packed_attention
from cora_cli.training.losses import response_losses

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
    row = Collator(share_prefixes)([data[GHOST]])
    assert row["input_ids"][0].tolist() == examples[1].input_ids
    assert row["labels"].numel() == row["real_tokens"] == 0


def test_the_collator_shares_prefixes_where_it_is_told_to():
    stem = list(range(20))
    items = [(Example([*stem, 30], 20), False), (Example([*stem, 31, 32], 20), False)]
    shared, unshared = Collator(True)(items), Collator(False)(items)
    assert shared["input_ids"].shape == (1, 23)
    assert unshared["input_ids"].shape == (1, 43)
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


@pytest.mark.parametrize("share_prefixes", [True, False])
@pytest.mark.parametrize(("batch_size", "accumulation", "world"), [(2, 2, 3), (3, 1, 4), (1, 4, 3)])
def test_the_gradient_of_an_epoch_dealt_over_processes_is_that_of_one_process(batch_size, accumulation, world, share_prefixes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.3, **sizes)).double()
    register_packed_attention()
    model.set_attn_implementation("cora_segments" if share_prefixes else "sdpa")
    examples = make_examples([(1 + n % 4, 1 + n % 5) for n in range(14)])

    def gradients(parts):
        model.zero_grad(set_to_none=True)
        for batches in parts:
            for row in DataLoader(ExampleSet(examples), batch_sampler=batches, collate_fn=Collator(share_prefixes)):
                response_losses(model, row).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    whole = gradients([GlobalBatches(14, 14, 1, 0, 1, seed=3)])
    dealt_out = gradients([GlobalBatches(14, batch_size, accumulation, rank, world, seed=3) for rank in range(world)])
    for name, wanted in whole.items():
        # Norms compute in float32 whatever the model's dtype is.
        assert (dealt_out[name] - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name
