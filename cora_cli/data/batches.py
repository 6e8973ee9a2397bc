"""Deals the examples of a data set out into batches: the same optimizer batches in the same order for every number of processes.

What a batch becomes as tensors is `pack`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from cora_cli.data.encode import Example
from cora_cli.data.pack import pack

GHOST = -1
"""Index of a batch member that carries no loss: it keeps a process in step where the last batch has too few examples."""


class ExampleSet(Dataset):
    """Examples by index. `GHOST` is the shortest example; the collator takes its labels away."""

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
        """One packed row, as `pack` makes it."""
        return pack([example for example, _ in items], [ghost for _, ghost in items], self._share_prefixes)


class GlobalBatches(Sampler[list[int]]):
    """The batches of one process, such that every world size trains on the same optimizer batches in the same order.

    An optimizer batch of `batch_size × accumulation × world_size` examples is drawn from a permutation that depends on the seed
    and the epoch alone, and is then dealt out to micro-batches and processes. The last one of an epoch may be short; it is dealt
    out evenly, and a process that is left without examples gets a ghost.
    """

    def __init__(self, count: int, batch_size: int, accumulation: int, rank: int, world_size: int, seed: int) -> None:
        self._count, self._parts, self._accumulation = count, accumulation * world_size, accumulation
        self._global = batch_size * self._parts
        self._rank, self._world_size, self._seed = rank, world_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose permutation is drawn next."""
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
