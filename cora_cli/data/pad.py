"""Pad the examples of a batch on the right, for models that packed rows do not serve.

Nothing is behind the end of an example but padding, which no causal layer looks at, so the model numbers positions by itself.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch

from cora_cli.data.encode import Example

PADDING = 0
"""Any id with an embedding row will do; that of a tokenizer's padding token may have none."""


def pad(examples: Sequence[Example], ghosts: Sequence[bool], arguments: Collection[str]) -> dict[str, Any]:
    """Collate examples into rows of equal length.

    Returns `input_ids` (examples, width); those of `attention_mask` (examples, width) and `logits_to_keep` (kept,), the columns before
    any response token, that are among `arguments`, which the model's forward pass takes; and `label_rows` and `label_columns` (labels,),
    where its logits predict `labels` and `shift_labels` (labels,), one example after the other. A ghost has no labels.
    """
    width = max(len(example.input_ids) for example in examples)
    gaps = [width - len(example.input_ids) for example in examples]
    rows: list[int] = []
    columns: list[int] = []
    labels: list[int] = []
    for row, (example, ghost) in enumerate(zip(examples, ghosts, strict=True)):
        if not ghost:
            predicting = range(example.prompt_length - 1, len(example.input_ids) - 1)
            rows += [row] * len(predicting)
            columns += predicting
            labels += example.input_ids[example.prompt_length :]
    targets = torch.tensor(labels, dtype=torch.long)
    batch: dict[str, Any] = {
        "input_ids": torch.tensor([example.input_ids + [PADDING] * gap for example, gap in zip(examples, gaps, strict=True)])
    }
    if "attention_mask" in arguments:
        batch["attention_mask"] = torch.tensor([[1] * (width - gap) + [0] * gap for gap in gaps])
    if "logits_to_keep" in arguments:
        kept = sorted(set(columns))  # by tensors, a plan could not: how many there are depends on values
        place = {column: index for index, column in enumerate(kept)}
        columns = [place[column] for column in columns]
        batch["logits_to_keep"] = torch.tensor(kept, dtype=torch.long)
    if "use_cache" in arguments:
        batch["use_cache"] = False
    return {
        **batch,
        "label_rows": torch.tensor(rows, dtype=torch.long),
        "label_columns": torch.tensor(columns, dtype=torch.long),
        "labels": targets,
        "shift_labels": targets,
    }
