"""The tokens of a run's micro-batches, and which of them takes most memory, from the orders in which runs see their examples."""

import inspect
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from cora_cli.data.batches import BatchForm, Collator, epoch_order
from cora_cli.data.encode import Example
from cora_cli.models.configuration import rope_switch
from cora_cli.training.arguments import number_of_processes, total_steps
from cora_cli.training.batching import cannot_pack
from cora_cli.training.config import TrainConfig
from cora_cli.training.heldout import rows_of
from cora_cli.training.prepare import Prepared

EPOCHS = 200
"""Epochs that are searched for the largest micro-batch. In runs of more, the largest examples together stand for those of the others."""
LAID_OUT = 4096
"""The micro-batches that are laid out to find the largest at most, those with the most tokens first. It ends sooner, mostly at the first, where no other can
be larger; examples that share a prefix have fewer tokens in a row than their sum, so that many may have to be."""


def responses(example: Example) -> int:
    """The tokens of an example that carry loss."""
    return len(example.input_ids) - example.prompt_length


def planned_form(config: TrainConfig, prepared: Prepared) -> BatchForm:
    """The form of batches that `choose_batching` will choose, as far as the model's class tells."""
    skeleton, switch = prepared.skeleton, rope_switch(prepared.model_config)
    if cannot_pack(skeleton) is None:
        return BatchForm("packed", prepared.attention.shares_prefixes, switch, tokens_per_row=config.tokens_per_row)
    return BatchForm("padded", False, switch, frozenset(inspect.signature(skeleton.forward).parameters), config.tokens_per_row)


class Work:
    """The `tokens` and `labels` of all micro-batches of a run of `steps`, and the `passes` of the one that takes most memory, the largest first:
    `largest` and `largest_labels` are the tokens and labels of that one.

    With `seeds`, that micro-batch is the largest one of all runs that differ from this one in their seed only.
    """

    def __init__(
        self, config: TrainConfig, prepared: Prepared, form: BatchForm, steps: int, processes: int, seeds: Collection[int] = ()
    ) -> None:
        self._form, self._examples, self._batch_size = form, prepared.train.examples, config.batch_size
        text = prepared.model_config.get_text_config(decoder=True)
        layers = int(text.num_hidden_layers)
        # With checkpointing, each layer keeps its input in 16 bits, and one layer at a time everything else.
        kept = 34 + 2 * layers if config.gradient_checkpointing else 34 * layers
        self._per_token, self._per_label = kept * int(text.hidden_size), 8 * int(text.vocab_size)
        self._lengths = torch.tensor([len(example.input_ids) for example in self._examples])
        self._labels = torch.tensor(list(map(responses, self._examples)))
        together = config.gradient_accumulation * processes
        # As `GlobalBatches` cuts an epoch, for all processes.
        batches = torch.arange(len(self._examples)).split(config.batch_size * together)
        self._sizes = [len(part) for batch in batches for part in batch.tensor_split(together)]
        self._epochs, rest = divmod(steps, len(batches))
        self._last_sizes = self._sizes[: rest * together]

        last = self._last_order(config.seed)
        self.tokens = self._epochs * prepared.train.tokens + int(self._lengths[last].sum())
        self.labels = self._epochs * prepared.train.response_tokens + int(self._labels[last].sum())
        found = self._largest_batches({config.seed, *seeds})
        self.passes = self._split(found[0][1])
        for upper, batch in found[1:]:
            if upper <= self.size(self.passes[0]):
                break
            self.passes = max(self.passes, self._split(batch), key=lambda parts: self.size(parts[0]))
        # Two passes are as many as ever exist at once: one, and the gradients of those before.
        self.batch: dict[str, Any] = Collator(form)([(example, False) for example in self._members(self.passes[0])])
        self.batch["passes"] *= min(2, len(self.passes))

        largest = self._members(self.passes[0])
        self.largest, self.largest_labels = form.tokens(largest), sum(map(responses, largest))

    def _last_order(self, seed: int) -> torch.Tensor:
        """The examples of the epoch that the run begins and does not end."""
        return epoch_order(len(self._examples), seed, self._epochs)[: sum(self._last_sizes)]

    def _largest_batches(self, seeds: Collection[int]) -> list[tuple[int, list[int]]]:
        """The bytes that the micro-batches with the most of them keep at most, and their examples; the largest first."""
        found: dict[tuple[int, ...], int] = {}
        for seed in seeds:
            for epoch in range(min(self._epochs, EPOCHS)):
                found |= self._largest_of(epoch_order(len(self._examples), seed, epoch), self._sizes)
            if self._last_sizes:
                found |= self._largest_of(self._last_order(seed), self._last_sizes)
        if self._epochs > EPOCHS:
            each = self._lengths * self._per_token + self._labels * self._per_label
            most = each.topk(min(self._batch_size, len(each))).indices
            found |= self._largest_of(most, [len(most)])
        ordered = sorted(found.items(), key=lambda entry: entry[1], reverse=True)
        return [(upper, list(batch)) for batch, upper in ordered[:LAID_OUT]]

    def _largest_of(self, order: torch.Tensor, sizes: list[int]) -> dict[tuple[int, ...], int]:
        """As `_largest_batches`, of the examples in this order, which are cut into micro-batches of these sizes."""
        counts = torch.tensor(sizes)
        batch_of = torch.repeat_interleave(torch.arange(len(sizes)), counts)
        zeros = torch.zeros(len(sizes), dtype=torch.int64)
        tokens, labels = zeros.index_add(0, batch_of, self._lengths[order]), zeros.index_add(0, batch_of, self._labels[order])
        if self._form.kind != "packed":
            tokens = counts * zeros.scatter_reduce(0, batch_of, self._lengths[order], "amax")
        uppers = tokens * self._per_token + labels * self._per_label
        ends = counts.cumsum(0)
        top = uppers.topk(min(LAID_OUT, len(sizes))).indices.tolist()
        return {tuple(sorted(order[ends[place] - counts[place] : ends[place]].tolist())): int(uppers[place]) for place in top}

    def _members(self, part: Sequence[int]) -> list[Example]:
        return [self._examples[index] for index in part]

    def size(self, part: Sequence[int]) -> int:
        """Bytes that a pass of these examples keeps for the backward pass, roughly."""
        members = self._members(part)
        return self._form.tokens(members) * self._per_token + sum(map(responses, members)) * self._per_label

    def _split(self, batch: list[int]) -> list[list[int]]:
        """The passes of a micro-batch, the largest first."""
        parts = self._form.passes(self._members(batch))
        return sorted(([batch[member] for member in part] for part in parts), key=self.size, reverse=True)

    def held_out(self, *sets: Sequence[Example]) -> Iterator[list[Example]]:
        """The largest pass in which the held-out loss of each set is measured; none for an empty set."""
        for records in sets:
            passes = [[row[member] for member in part] for row in _rows(records) for part in self._form.passes(row)]
            if passes:
                yield max(passes, key=self._upper)

    def start(self, examples: Sequence[Example]) -> list[list[Example]]:
        """The largest pass in which the gradient of these examples is taken, twice if there are several: gradients of earlier ones exist then."""
        passes = [[row[member] for member in part] for row in _rows(examples) for part in self._form.passes(row)]
        return [max(passes, key=self._upper)] * min(2, len(passes))

    def start_bytes(self, examples: Sequence[Example]) -> int:
        """Bytes that this pass keeps for its backward pass, roughly."""
        return self._upper(self.start(examples)[0])

    def held_out_labels(self, *sets: Sequence[Example]) -> int:
        """The most tokens with loss in a row of held-out examples, or in one example where rows are to be short."""
        rows = [row for records in sets for row in _rows(records)]
        if self._form.tokens_per_row is not None:
            rows = [[example] for row in rows for example in row]
        return max((sum(map(responses, row)) for row in rows), default=0)

    def _upper(self, members: Sequence[Example]) -> int:
        return sum(len(each.input_ids) * self._per_token + responses(each) * self._per_label for each in members)


def work_of(config: TrainConfig, prepared: Prepared, seeds: Collection[int] = ()) -> Work:
    """The work of the complete run of `config`; `seeds` as in `Work`."""
    steps = total_steps(config, len(prepared.train.examples))
    return Work(config, prepared, planned_form(config, prepared), steps, number_of_processes(config), seeds)


def _rows(records: Sequence[Example]) -> list[list[Example]]:
    """The rows in which a held-out loss is measured."""
    order = sorted(range(len(records)), key=lambda index: len(records[index].input_ids))
    return [[records[index] for index in row] for row in rows_of(records, order)]
