"""Packs the examples of a batch into one row without padding, with attention inside each document only.

The loss of a packed row equals the loss of the padded batch: positions restart at 0 in every document, no token sees another
document, and logits are computed only where a label is. Choosing the attention kernel is `device.select_packed_attention`.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cora_cli.data.encode import Example

IGNORED = -100
GHOST = -1
"""Index of a batch member that carries no loss: it keeps a process in step where the last batch has too few examples."""


def pack(examples: Sequence[Example], ghosts: Sequence[bool] | None = None) -> dict[str, Any]:
    """Collate examples into one row.

    Returns `input_ids`, `position_ids`, `labels`, each (1, tokens); `cu_seq_lens_q/k` (documents + 1,) int32 with the
    boundaries and `max_length_q/k`, as FlashAttention's varlen form wants them. `labels` is `IGNORED` on prompts.
    """
    hidden = ghosts or [False] * len(examples)
    lengths = [len(example.input_ids) for example in examples]
    labels = [
        [IGNORED] * len(example.input_ids)
        if ghost
        else [IGNORED] * example.prompt_length + example.input_ids[example.prompt_length :]
        for example, ghost in zip(examples, hidden, strict=True)
    ]
    boundaries = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return {
        "input_ids": torch.tensor([list(itertools.chain.from_iterable(example.input_ids for example in examples))]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "labels": torch.tensor([list(itertools.chain.from_iterable(labels))]),
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def response_losses(model: torch.nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of every response token of a packed row.

    Returns the losses (labelled tokens,) in float32 and the index (labelled tokens,) of the token before each in the row.
    """
    inputs = dict(batch)
    labels = inputs.pop("labels")[0]
    positions = (labels[1:] != IGNORED).nonzero()[:, 0]
    logits = model(**inputs, use_cache=False, logits_to_keep=positions).logits[0]
    return torch.nn.functional.cross_entropy(logits.float(), labels[positions + 1], reduction="none"), positions


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document of a packed row; an ordinary SDPA where there are no boundaries.

    query: (1, heads, tokens, head_dim); key, value: (1, key_value_heads, tokens, head_dim). Returns (1, tokens, heads, head_dim).
    A window narrower than a document is taken from the dense mask that transformers built.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    outputs = []
    for start, end in itertools.pairwise(cu_seq_lens_q.tolist()):
        part = slice(start, end)
        windowed = sliding_window is not None and end - start > sliding_window and attention_mask is not None
        mask = attention_mask[:, :, part, part] if windowed and attention_mask is not None else None
        document = sdpa_attention_forward(module, query[:, :, part], key[:, :, part], value[:, :, part], mask, **kwargs)
        outputs.append(document[0])
    return torch.cat(outputs, dim=1), None


AttentionInterface.register("cora_packed", packed_attention)
AttentionMaskInterface.register("cora_packed", sdpa_mask)


class ExampleSet(Dataset):
    """Examples by index. `GHOST` is the shortest example; `collate` takes its labels away."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples
        self._shortest = min(examples, key=lambda example: len(example.input_ids)) if examples else None

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Example | None, bool]:
        return (self._shortest, True) if index == GHOST else (self.examples[index], False)


def collate(items: Sequence[tuple[Example, bool]]) -> dict[str, Any]:
    """Pack members of an `ExampleSet`."""
    return pack([example for example, _ in items], [ghost for _, ghost in items])


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
