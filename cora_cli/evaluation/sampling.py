"""Choose tokens: the most likely one, or one drawn at a temperature.

A draw depends on its record, sample and place alone and not on what is decoded with it.
"""

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor

from cora_cli.errors import CoraError


def best_tokens(logits: torch.Tensor) -> list[int]:
    """The most likely token of each row of `logits` (rows, vocabulary). Raises `CoraError` where the largest logit is no number."""
    largest, chosen = logits.float().max(dim=-1)
    if not bool(largest.isfinite().all()):
        raise CoraError(
            "the model's output is not finite (NaN or infinity), so it has no answers: its weights are damaged, or too large for this "
            "precision; try --dtype fp32, or another copy of the model"
        )
    tokens: list[int] = chosen.tolist()
    return tokens


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Tokens drawn from softmax(logits / temperature), with `seed`."""

    temperature: float
    seed: int

    def choose(self, logits: torch.Tensor, streams: Sequence[str], places: Sequence[int]) -> list[int]:
        """One token for each row of `logits` (rows, vocabulary): the draw of a stream at a place in its answer.

        Raises `CoraError` as `best_tokens` does.
        """
        largest = torch.tensor(best_tokens(logits), device=logits.device)[:, None]
        # The uniform number is independent of the batch; float64, so that it falls between two tokens as it does elsewhere. The largest
        # logit is subtracted first, so that no temperature is too small.
        wide = logits.double()
        sums = ((wide - wide.gather(-1, largest)) / self.temperature).softmax(dim=-1).cumsum(dim=-1)
        drawn = [random.Random(f"{self.seed} {stream} {place}").random() for stream, place in zip(streams, places, strict=True)]
        at = torch.tensor(drawn, dtype=sums.dtype, device=sums.device)[:, None] * sums[:, -1:]
        chosen: list[int] = torch.searchsorted(sums, at, right=True)[:, 0].clamp(max=logits.shape[-1] - 1).tolist()
        return chosen


def describe(temperature: float, samples: int, seed: int) -> str:
    """The decoding of an evaluation, in words."""
    return f"sampled at temperature {temperature:g}, {samples} per record, seed {seed}" if temperature else "greedy"


def streams(record: int, temperature: float, samples: int) -> list[str]:
    """The names of the draws of each sample of a record; empty for greedy decoding, which draws nothing."""
    return [f"{record} {sample}" if temperature else "" for sample in range(samples)]


class Finite(LogitsProcessor):
    """Refuses logits of which transformers' greedy `generate` would choose something although they are no numbers; see `best_tokens`."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """See `LogitsProcessor`: the scores as they are."""
        best_tokens(scores)
        return scores


class Draws(LogitsProcessor):
    """Lets transformers' greedy `generate` choose what `Sampling` draws for the rows of a batch, whose prompts have `length` tokens."""

    def __init__(self, sampling: Sampling, streams: Sequence[str], length: int) -> None:
        self._sampling, self._streams, self._length = sampling, streams, length

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """See `LogitsProcessor`: every score but that of the drawn token becomes -inf."""
        places = [input_ids.shape[1] - self._length] * len(input_ids)
        chosen = torch.tensor(self._sampling.choose(scores, self._streams, places), device=scores.device)
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen[:, None], 0.0)
