import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cora_cli.data import pack as packing
from cora_cli.data.encode import Example
from cora_cli.data.pack import lay_out, pack

repeatable = settings(derandomize=True, deadline=None, max_examples=120)
# Two tokens are so few that prefixes, duplicates and sequences that continue another one come up all the time.
sequences = st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=9), min_size=1, max_size=6)
sharing = st.sampled_from([1, 2, 3, 4, None])


@st.composite
def batches(draw):
    """Examples with at least one prompt and one response token each, and which of them are ghosts."""
    tokens = st.lists(st.integers(1, 2), min_size=2, max_size=9)
    examples = [Example(ids, draw(st.integers(1, len(ids) - 1))) for ids in draw(st.lists(tokens, min_size=1, max_size=5))]
    return examples, draw(st.lists(st.booleans(), min_size=len(examples), max_size=len(examples)))


def places(layout, path):
    """The row's tokens that a path spells, in the order of the sequence."""
    return [place for index in path for place in range(layout.segments[index].start, layout.segments[index].end)]


def common_length(first, second):
    """Length of the longest common prefix, counted one by one."""
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return length


# The layout


@given(sequences=sequences, shortest=sharing)
@example(sequences=[[1, 1, 2], [1, 1], [1], [1, 1, 2]], shortest=1)
@repeatable
def test_every_path_spells_its_sequence_in_a_row_where_each_place_has_one_token(sequences, shortest):
    layout, paths = lay_out(sequences, shortest)
    row = {}
    assert len(paths) == len(sequences)
    for sequence, path in zip(sequences, paths, strict=True):
        spelled = places(layout, path)
        assert len(spelled) == len(sequence)
        for place, token in zip(spelled, sequence, strict=True):
            assert row.setdefault(place, token) == token
    assert sorted(row) == list(range(layout.tokens)), "nothing in the row belongs to no sequence"


@given(sequences=sequences, shortest=sharing)
@repeatable
def test_segments_tile_the_row_and_paths_are_chains_of_ancestors_that_come_before(sequences, shortest):
    layout, paths = lay_out(sequences, shortest)
    ends = [segment.end for segment in layout.segments]
    assert [segment.start for segment in layout.segments] == [0, *ends[:-1]]
    assert all(segment.length == segment.end - segment.start > 0 for segment in layout.segments)
    assert layout.tokens == ends[-1]
    for index, segment in enumerate(layout.segments):
        assert all(ancestor < index for ancestor in segment.ancestors)
        if segment.ancestors:
            parent = segment.ancestors[-1]
            assert segment.ancestors == (*layout.segments[parent].ancestors, parent)
    for path in paths:
        assert layout.segments[path[-1]].ancestors == path[:-1]


@given(sequences=sequences, shortest=sharing)
@repeatable
def test_positions_and_descent_are_those_of_the_paths(sequences, shortest):
    layout, paths = lay_out(sequences, shortest)
    descent = torch.zeros(len(layout.segments), len(layout.segments), dtype=torch.bool)
    for path in paths:
        spelled = places(layout, path)
        assert layout.positions[spelled].tolist() == list(range(len(spelled)))
        assert layout.segment_of[spelled].tolist() == [index for index in path for _ in range(layout.segments[index].length)]
        for place, index in enumerate(path):
            descent[index, list(path[: place + 1])] = True
    assert torch.equal(layout.descent, descent)
    assert layout.positions.dtype == layout.segment_of.dtype == torch.int64


@given(sequences=sequences)
@repeatable
def test_without_sharing_every_sequence_is_one_segment_in_its_order(sequences):
    layout, paths = lay_out(sequences, None)
    assert paths == [(index,) for index in range(len(sequences))]
    assert [segment.length for segment in layout.segments] == [len(sequence) for sequence in sequences]
    assert all(segment.ancestors == () for segment in layout.segments)


@given(sequences=sequences)
@repeatable
def test_where_one_token_is_enough_to_share_the_row_has_the_nodes_of_the_prefix_tree(sequences):
    nodes = {tuple(sequence[: length + 1]) for sequence in sequences for length in range(len(sequence))}
    assert lay_out(sequences, 1)[0].tokens == len(nodes)


@given(sequences=sequences, shortest=st.integers(1, 4))
@example(sequences=[[1, 1, 2, 2, 1], [1, 1, 2, 2, 2], [1, 1, 2]], shortest=2)
@repeatable
def test_long_enough_prefixes_are_shared_and_no_shorter_ones(sequences, shortest):
    layout, paths = lay_out(sequences, shortest)
    users = [sum(index in path for path in paths) for index in range(len(layout.segments))]
    assert all(segment.length >= shortest for segment, count in zip(layout.segments, users, strict=True) if count > 1)
    assert layout.tokens <= sum(map(len, sequences))
    for (first, one), (second, other) in itertools.combinations(zip(sequences, paths, strict=True), 2):
        shared = sum(layout.segments[index].length for index in set(one) & set(other))
        assert (shared >= shortest) == (common_length(first, second) >= shortest)


# The packed row


def assert_labels_follow_their_path(row, examples, ghosts):
    """Each label is one of a response, and what the place it is predicted from has before it is that example's beginning."""
    layout, ids = row["layout"], row["input_ids"][0]
    expected = [
        (shown.input_ids[:length], shown.input_ids[length])
        for shown, ghost in zip(examples, ghosts, strict=True)
        if not ghost
        for length in range(shown.prompt_length, len(shown.input_ids))
    ]
    found = []
    for place, label in zip(row["logits_to_keep"].tolist(), row["labels"].tolist(), strict=True):
        segment = layout.segments[int(layout.segment_of[place])]
        before = [*places(layout, segment.ancestors), *range(segment.start, place + 1)]
        assert row["position_ids"][0, before].tolist() == list(range(len(before)))
        found.append((ids[before].tolist(), label))
    assert found == expected


@given(batch=batches(), shortest=st.integers(1, 4))
@repeatable
def test_a_shared_row_predicts_each_response_token_from_all_that_comes_before_it_in_its_example(batch, shortest):
    examples, ghosts = batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SHORTEST_SHARED", shortest)
        row = pack(examples, ghosts)
    layout, paths = lay_out([shown.input_ids for shown in examples], shortest)
    assert row["layout"] == layout
    assert torch.equal(row["position_ids"], layout.positions[None])
    assert row["input_ids"].shape == row["position_ids"].shape == (1, layout.tokens)
    for shown, path in zip(examples, paths, strict=True):
        assert row["input_ids"][0, places(layout, path)].tolist() == shown.input_ids
    assert_labels_follow_their_path(row, examples, ghosts)
    assert row["real_tokens"] == sum(len(shown.input_ids) for shown, ghost in zip(examples, ghosts, strict=True) if not ghost)
    assert torch.equal(row["labels"], row["shift_labels"])
    assert row["input_ids"].dtype == row["logits_to_keep"].dtype == row["labels"].dtype == torch.int64


def test_a_response_that_begins_inside_a_prefix_of_another_example_has_its_labels_there():
    stem = list(range(100, 120))
    examples = [Example([*stem, 1, 2], 3), Example([*stem, 3], 20), Example([*stem, 1, 2], 21)]
    row = pack(examples)
    assert row["input_ids"].numel() == 20 + 2 + 1 + 2
    assert_labels_follow_their_path(row, examples, [False] * 3)
    assert row["real_tokens"] == 22 + 21 + 22


@pytest.mark.parametrize(("shared", "tokens"), [(packing.SHORTEST_SHARED - 1, 40), (packing.SHORTEST_SHARED, 24)])
def test_a_prefix_is_shared_from_its_shortest_length_on(shared, tokens):
    first, second = [list(range(shared)) + [filler] * (20 - shared) for filler in (30, 40)]
    assert pack([Example(first, 5), Example(second, 5)])["input_ids"].numel() == tokens


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_a_ghost_has_tokens_but_neither_labels_nor_a_count(share_prefixes):
    real, ghost = Example([1, 2, 3, 4], 2), Example([5, 6, 7], 1)
    row = pack([real, ghost], [False, True], share_prefixes)
    assert sorted(row["input_ids"][0].tolist()) == [1, 2, 3, 4, 5, 6, 7]
    assert row["labels"].tolist() == [3, 4]
    assert row["real_tokens"] == 4
    alone = pack([ghost], [True], share_prefixes)
    assert alone["input_ids"].tolist() == [[5, 6, 7]]
    assert alone["labels"].shape == alone["logits_to_keep"].shape == (0,)
    assert alone["labels"].dtype == alone["logits_to_keep"].dtype == torch.int64
    assert alone["real_tokens"] == 0


@given(batch=batches())
@repeatable
def test_without_sharing_the_row_has_the_boundaries_of_its_documents_and_no_layout(batch):
    examples, ghosts = batch
    row = pack(examples, ghosts, share_prefixes=False)
    bounds, kept, labels = row["cu_seq_lens_q"].tolist(), [], []
    assert "layout" not in row
    assert row["cu_seq_lens_q"].dtype == torch.int32
    assert torch.equal(row["cu_seq_lens_q"], row["cu_seq_lens_k"])
    assert row["max_length_q"] == row["max_length_k"] == max(len(shown.input_ids) for shown in examples)
    for shown, ghost, (start, end) in zip(examples, ghosts, itertools.pairwise(bounds), strict=True):
        assert row["input_ids"][0, start:end].tolist() == shown.input_ids
        assert row["position_ids"][0, start:end].tolist() == list(range(end - start))
        if not ghost:
            kept += range(start + shown.prompt_length - 1, end - 1)
            labels += shown.input_ids[shown.prompt_length :]
    assert bounds[0] == 0
    assert bounds[-1] == row["input_ids"].numel() == row["position_ids"].numel()
    assert row["logits_to_keep"].tolist() == kept
    assert row["labels"].tolist() == row["shift_labels"].tolist() == labels
