"""Distribute the examples of a data set into batches: any number of processes sees the same optimizer batches in one order.

`pack` and `pad` turn a batch, or the examples of it that one forward pass may hold, into tensors.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch.utils.data import Dataset, Sampler

from cora_cli.data.encode import Example
from cora_cli.data.pack import SHORTEST_SHARED, lay_out, pack
from cora_cli.data.pad import pad

NOT_ARGUMENTS = frozenset({"labels", "shift_labels", "real_tokens", "label_rows", "label_columns"})
"""Entries of a collated pass that are not for the model."""
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


@dataclasses.dataclass(frozen=True)
class BatchForm:
    """How the examples of a batch go through a model.

    `kind`: "packed" is one row without padding, "padded" a row each, "single" a forward pass each. `shares_prefixes`: whether a packed
    row stores shared prefixes once. `switch`: examples of up to and of above so many tokens never share a pass. `arguments`: those of
    the model's forward pass, for rows that are not packed. `tokens_per_row`: the most tokens of a pass, unless one example has more.
    """

    kind: Literal["packed", "padded", "single"]
    shares_prefixes: bool = False
    switch: int | None = None
    arguments: frozenset[str] = frozenset()
    tokens_per_row: int | None = None

    @property
    def is_one_pass(self) -> bool:
        """Whether any examples go through the model in one forward pass."""
        return self.kind != "single" and self.switch is None and self.tokens_per_row is None

    def passes(self, examples: Sequence[Example]) -> list[list[int]]:
        """The indices of the examples of each forward pass."""
        if self.kind == "single":
            return [[index] for index in range(len(examples))]
        sides: dict[bool, list[int]] = {}
        for index, example in enumerate(examples):
            sides.setdefault(self.switch is not None and len(example.input_ids) > self.switch, []).append(index)
        return [part for side in sorted(sides) for part in self._split(sides[side], examples)]

    def tokens(self, examples: Sequence[Example]) -> int:
        """The tokens of one forward pass over the examples, padding included."""
        lengths = [len(example.input_ids) for example in examples]
        if self.kind != "packed":
            return len(lengths) * max(lengths)
        if not self.shares_prefixes:
            return sum(lengths)
        return lay_out([example.input_ids for example in examples], SHORTEST_SHARED)[0].tokens

    def _split(self, indices: list[int], examples: Sequence[Example]) -> list[list[int]]:
        """The examples `indices` in passes of at most `tokens_per_row` tokens each."""
        if self.tokens_per_row is None or self.tokens([examples[index] for index in indices]) <= self.tokens_per_row:
            return [indices]
        parts: list[list[int]] = []
        # Sorted, so that examples with a common prefix share a row.
        for index in sorted(indices, key=lambda index: examples[index].input_ids):
            if parts and self.tokens([examples[member] for member in (*parts[-1], index)]) <= self.tokens_per_row:
                parts[-1].append(index)
            else:
                parts.append([index])
        return parts

    def collate(self, examples: Sequence[Example], ghosts: Sequence[bool] | None = None) -> dict[str, Any]:
        """The tensors of one forward pass; see `pack` and `pad`."""
        if self.kind == "packed":
            return pack(examples, ghosts, self.shares_prefixes)
        return pad(examples, ghosts or [False] * len(examples), self.arguments)


def predicting_logits(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """The logits (labels, vocabulary) that predict the `labels` of one forward pass, from `pack` or `pad`."""
    logits = model(**{name: value for name, value in batch.items() if name not in NOT_ARGUMENTS}).logits
    found: torch.Tensor = logits[batch["label_rows"], batch["label_columns"]] if "label_rows" in batch else logits[0]
    return found


class Collator:
    """Collates members of an `ExampleSet`."""

    def __init__(self, form: BatchForm) -> None:
        self._form = form

    def __call__(self, items: Sequence[tuple[Example, bool]]) -> dict[str, Any]:
        """`passes`, the tensors of each forward pass; `labels` and `shift_labels` (labels,), those of all passes, which the Trainer
        counts; and `real_tokens`, the number of tokens of all examples but ghosts.
        """
        passes = []
        for indices in self._form.passes([example for example, _ in items]):
            members = [items[index] for index in indices]
            passes.append(self._form.collate([example for example, _ in members], [ghost for _, ghost in members]))
        labels = torch.cat([each["labels"] for each in passes])
        real_tokens = sum(len(example.input_ids) for example, ghost in items if not ghost)
        return {"passes": passes, "labels": labels, "shift_labels": labels, "real_tokens": real_tokens}


def epoch_order(count: int, seed: int, epoch: int) -> torch.Tensor:
    """The permutation of `count` examples in an epoch: (count,) int64. It depends on nothing else."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


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
        for batch in epoch_order(self._count, self._seed, self.epoch).split(self._global):
            parts = batch.tensor_split(self._parts)
            for micro in range(self._accumulation):
                part = parts[micro * self._world_size + self._rank].tolist()
                yield part or [GHOST]
