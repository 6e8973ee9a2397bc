"""The held-out loss, record by record, for intervals and paired comparisons.

It is the mean negative log-likelihood per response token in nats. Nothing is selected by it: there is no early stopping and no best
checkpoint.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from accelerate.utils import gather_object

from cora_cli.data.batches import BatchForm
from cora_cli.data.encode import Example
from cora_cli.device import Hardware
from cora_cli.intervals import bootstrap_interval
from cora_cli.progress import progress
from cora_cli.training.losses import response_losses
from cora_cli.training.sharding import is_sharded, most

ROW_TOKENS = 4096
RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class HeldOutLoss:
    """`nll` (records,) is each record's summed negative log-likelihood, `tokens` (records,) its response tokens."""

    nll: np.ndarray
    tokens: np.ndarray

    @property
    def mean(self) -> float:
        """Nats per response token over all records."""
        return float(self.nll.sum() / self.tokens.sum())

    def summary(self) -> dict[str, object]:
        """Value, 95 % bootstrap interval over records, and sizes."""
        statistics = np.stack([self.nll, self.tokens], axis=1)
        interval = bootstrap_interval(statistics, _ratio, resamples=RESAMPLES, seed=0)
        return {"loss": self.mean, "ci95": interval and list(interval), "n": len(self.nll), "tokens": int(self.tokens.sum())}


def loss_change(before: HeldOutLoss, after: HeldOutLoss) -> dict[str, object]:
    """After minus before, with its 95 % bootstrap interval over the same records."""
    statistics = np.stack([after.nll - before.nll, after.tokens], axis=1)
    interval = bootstrap_interval(statistics, _ratio, resamples=RESAMPLES, seed=0)
    return {"value": after.mean - before.mean, "ci95": interval and list(interval)}


def held_out_loss(
    model: torch.nn.Module,
    examples: Sequence[Example],
    hardware: Hardware,
    form: BatchForm,
    rank: int = 0,
    world_size: int = 1,
    label: str = "",
) -> HeldOutLoss:
    """Measure every example, in batches of similar lengths and of `form`; each of several processes measures its share."""
    mine = sorted(range(rank, len(examples), world_size), key=lambda index: len(examples[index].input_ids))
    measured: list[tuple[int, float, int]] = []
    training = model.training
    model.eval()
    rows = rows_of(examples, mine)
    passes = [[row[member] for member in part] for row in rows for part in form.passes([examples[index] for index in row])]
    # Every pass of a sharded model is one of all processes, so they agree on their number before the first one.
    missing = most(len(passes), hardware.device) - len(passes) if is_sharded(model) else 0
    # Not in inference mode, in which FSDP2 would create tensors that it cannot use in training.
    with torch.no_grad(), progress(label or "held-out loss", len(mine), "records") as shown:
        for members in passes:
            measured += _measure(model, examples, members, hardware, form)
            shown.advance(len(members))
        for _ in range(missing):
            row_losses(model, [examples[0]], hardware, form)
    model.train(training)
    if world_size > 1:
        measured = gather_object(measured)
    measured.sort()
    return HeldOutLoss(np.array([nll for _, nll, _ in measured]), np.array([tokens for _, _, tokens in measured], dtype=float))


def rows_of(examples: Sequence[Example], indices: Sequence[int]) -> list[list[int]]:
    """The examples `indices`, shortest first, in groups of at most `ROW_TOKENS` tokens or one example."""
    rows: list[list[int]] = []
    room = 0
    for index in indices:
        length = len(examples[index].input_ids)
        if length > room:
            rows.append([])
            room = ROW_TOKENS
        rows[-1].append(index)
        room -= length
    return rows


def _measure(
    model: torch.nn.Module, examples: Sequence[Example], row: list[int], hardware: Hardware, form: BatchForm
) -> list[tuple[int, float, int]]:
    members = [examples[index] for index in row]
    losses = row_losses(model, members, hardware, form)
    counts = [len(member.input_ids) - member.prompt_length for member in members]
    sums = [part.double().sum().item() for part in losses.split(counts)]
    return list(zip(row, sums, counts, strict=True))


def row_losses(model: torch.nn.Module, members: list[Example], hardware: Hardware, form: BatchForm) -> torch.Tensor:
    """Negative log-likelihood of every response token of the examples of one forward pass, one example after the other: (labels,)."""
    row_batch = form.collate(members)
    batch = {name: value.to(hardware.device) if isinstance(value, torch.Tensor) else value for name, value in row_batch.items()}
    mixed = hardware.dtype == torch.bfloat16
    # The cache would keep the bfloat16 copy of every complete layer until the end of the pass.
    with torch.autocast(hardware.device.type, torch.bfloat16, enabled=mixed, cache_enabled=not is_sharded(model)):
        return response_losses(model, batch)


def _ratio(sums: np.ndarray, count: int) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]
