"""Pack the examples of a batch into one row without padding, storing every shared prefix only once.

The row is a forest of segments: a shared prefix is one segment, and the continuations in each example are its children. With
causal attention along the path from the root this is exact, gradients included; see `training.attention`.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from cora_cli.data.encode import Example

SHORTEST_SHARED = 16
"""The shortest prefix, in tokens, that gets its own segment: below this, sharing costs more time than it saves."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """Tokens `start` to `end` of a row. They continue the segments `ancestors` (indices, the root first)."""

    start: int
    end: int
    ancestors: tuple[int, ...]

    @property
    def length(self) -> int:
        """The number of tokens."""
        return self.end - self.start


@dataclasses.dataclass(frozen=True)
class Layout:
    """The segments that make up one row, in order; each comes after its ancestors."""

    segments: tuple[Segment, ...]

    @property
    def tokens(self) -> int:
        """The number of tokens of the row."""
        return self.segments[-1].end

    @cached_property
    def descent(self) -> torch.Tensor:
        """Whether segment j is segment i or one of its ancestors: (segments, segments) bool."""
        count = len(self.segments)
        table = torch.eye(count, dtype=torch.bool)
        for index, segment in enumerate(self.segments):
            table[index, list(segment.ancestors)] = True
        return table

    @cached_property
    def segment_of(self) -> torch.Tensor:
        """The segment of each token of the row: (tokens,) int64."""
        lengths = torch.tensor([segment.length for segment in self.segments])
        return torch.repeat_interleave(torch.arange(len(self.segments)), lengths)

    @cached_property
    def keys(self) -> tuple[tuple[int, ...], ...]:
        """The tokens of the row that the last token of each segment follows, itself included: those of its ancestors and its own."""
        own = [tuple(range(segment.start, segment.end)) for segment in self.segments]
        return tuple(
            tuple(itertools.chain.from_iterable(own[index] for index in (*segment.ancestors, place)))
            for place, segment in enumerate(self.segments)
        )

    @cached_property
    def positions(self) -> torch.Tensor:
        """Each token's position within its examples: (tokens,) int64."""
        before = [sum(self.segments[index].length for index in segment.ancestors) for segment in self.segments]
        return torch.cat([torch.arange(segment.length) + depth for segment, depth in zip(self.segments, before, strict=True)])


def pack(examples: Sequence[Example], ghosts: Sequence[bool] | None = None, share_prefixes: bool = True) -> dict[str, Any]:
    """Collate examples into one row.

    Returns `input_ids` and `position_ids` (1, tokens); `logits_to_keep` (labels,), the position in the row before each response
    token, one example after the other; `labels` and `shift_labels` (labels,), those tokens; `real_tokens`, the number of
    tokens of all examples without sharing; and `use_cache`, which is off. A ghost has tokens but no labels and is not counted. With `share_prefixes` there is
    also a `layout`; without it, FlashAttention's varlen arguments `cu_seq_lens_q/k` (examples + 1,) int32 and `max_length_q/k`.
    """
    hidden = ghosts or [False] * len(examples)
    layout, paths = lay_out([example.input_ids for example in examples], SHORTEST_SHARED if share_prefixes else None)
    ids = [0] * layout.tokens
    kept: list[int] = []
    labels: list[int] = []
    for example, path, ghost in zip(examples, paths, hidden, strict=True):
        spans = [range(layout.segments[index].start, layout.segments[index].end) for index in path]
        row = list(itertools.chain.from_iterable(spans))
        for place, token in zip(row, example.input_ids, strict=True):
            ids[place] = token
        if not ghost:
            kept += row[example.prompt_length - 1 : -1]
            labels += example.input_ids[example.prompt_length :]
    targets = torch.tensor(labels, dtype=torch.long)
    batch = {
        "input_ids": torch.tensor([ids]),
        "position_ids": layout.positions[None],
        "logits_to_keep": torch.tensor(kept, dtype=torch.long),
        "labels": targets,
        "shift_labels": targets,  # tells the Trainer, which counts labels, that these are already shifted
        "real_tokens": sum(len(example.input_ids) for example, ghost in zip(examples, hidden, strict=True) if not ghost),
        "use_cache": False,
    }
    if share_prefixes:
        return {**batch, "layout": layout}
    lengths = [len(example.input_ids) for example in examples]
    boundaries = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return {
        **batch,
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def lay_out(sequences: Sequence[Sequence[int]], shortest_shared: int | None) -> tuple[Layout, list[tuple[int, ...]]]:
    """Arrange token sequences as a forest that shares prefixes of at least `shortest_shared` tokens (None: no sharing).

    Returns the layout and, for each sequence, the indices of its segments. Without sharing, segments are in the order of
    `sequences`.
    """
    segments: list[Segment] = []
    paths: list[tuple[int, ...]] = [()] * len(sequences)

    def place(members: Sequence[int], start: int, end: int, ancestors: tuple[int, ...]) -> tuple[int, ...]:
        """Add tokens `start` to `end`, which all these sequences share, as a segment after `ancestors`."""
        if end > start:
            first = segments[-1].end if segments else 0
            segments.append(Segment(first, first + end - start, ancestors))
            ancestors = (*ancestors, len(segments) - 1)
        for member in members:
            paths[member] = ancestors
        return ancestors

    if shortest_shared is None:
        for index, sequence in enumerate(sequences):
            place([index], 0, len(sequence), ())
        return Layout(tuple(segments)), paths

    # After sorting, sequences with a common prefix are adjacent, and a run shares the common prefix of its first and last one.
    everyone = sorted(range(len(sequences)), key=lambda index: (list(sequences[index]), index))
    waiting: list[tuple[list[int], int, tuple[int, ...]]] = [(everyone, 0, ())]
    while waiting:
        members, start, ancestors = waiting.pop()
        for run in _runs(sequences, members, start + shortest_shared):
            first, last = sequences[run[0]], sequences[run[-1]]
            end = len(first) if len(run) == 1 else _common(first, last)
            path = place(run, start, end, ancestors)
            longer = [member for member in run if len(sequences[member]) > end]
            if longer:
                waiting.append((longer, end, path))
    return Layout(tuple(segments)), paths


def _runs(sequences: Sequence[Sequence[int]], members: Sequence[int], depth: int) -> list[list[int]]:
    """Split sorted sequences into runs in which neighbours have the same first `depth` tokens."""
    runs = [[members[0]]]
    for before, member in itertools.pairwise(members):
        if _common(sequences[before], sequences[member]) >= depth:
            runs[-1].append(member)
        else:
            runs.append([member])
    return runs


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
