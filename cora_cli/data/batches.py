"""Distribute the examples of a data set into batches: any number of processes sees the same optimizer batches in one order.

`pack` turns a batch into tensors.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from cora_cli.data.encode import Example
from cora_cli.data.pack import pack

GHOST = -1
"""Index of a batch member without a loss. It keeps processes in step when the last batch has fewer examples than processes."""


class ExampleSet(Dataset):
    """Examples by index. `GHOST` gives the shortest example, whose labels the collator removes."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples
        self._shortest = min(examples, key=lambda example: len(example.input_ids)) if examples else None

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Example | None, bool]:
        return (self._shortest, True) if index == GHOST else (self.examples[index], False)


class Collator:
    """Packs members of an `ExampleSet`."""

    def __init__(self, share_prefixes: bool) -> None:
        self._share_prefixes = share_prefixes

    def __call__(self, items: Sequence[tuple[Example, bool]]) -> dict[str, Any]:
        """One packed row; see `pack`."""
        return pack([example for example, _ in items], [ghost for _, ghost in items], self._share_prefixes)


class GlobalBatches(Sampler[list[int]]):
    """The batches of one process. Every world size trains on the same optimizer batches in the same order.

    An optimizer batch of `batch_size × accumulation × world_size` examples comes from a permutation that depends only on the
    seed and the epoch, and is then split into micro-batches and processes. The last batch of an epoch may be smaller; it is
    split evenly, and a process without examples gets a ghost.
    """

    def __init__(self, count: int, batch_size: int, accumulation: int, rank: int, world_size: int, seed: int) -> None:
        self._count, self._parts, self._accumulation = count, accumulation * world_size, accumulation
        self._global = batch_size * self._parts
        self._rank, self._world_size, self._seed = rank, world_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the permutation of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self._count // self._global) * self._accumulation

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.epoch)
        order = torch.randperm(self._count, generator=generator)
        for batch in order.split(self._global):
            parts = batch.tensor_split(self._parts)
            for micro in range(self._accumulation):
                part = parts[micro * self._world_size + self._rank].tolist()
                yield part or [GHOST]
