"""How well a model's probabilities of the reference tokens hold: negative log-likelihood, Brier score, expected calibration error."""

from collections.abc import Iterator, Sequence
from typing import get_type_hints

import numpy as np

from cora_cli.errors import CoraError
from cora_cli.evaluation.metrics.base import Floats, StreamingMetric, check_texts, format_signature
from cora_cli.records import ReferenceTokens

BINS = 15
"""Intervals of equal width in which confidence and accuracy are compared."""


class Calibration(StreamingMetric):
    """A mean over all reference tokens, each predicted from the prompt and the reference tokens before it. Lower is better.

    `nll` is −log p of the reference token in nats. `brier` is Σ_k (p_k − y_k)² over the vocabulary, 0 to 2 (Brier 1950). `ece` is
    Σ_b |n_b(correct)/N − Σ confidence/N| over 15 bins of the confidence in the most likely token (Guo et al. 2017, arXiv 1706.04599).
    Long references count for more, since they have more tokens.
    """

    blind_spot = ""

    def __init__(self, name: str, tokens: Sequence[ReferenceTokens] | None) -> None:
        self.name = name
        self._tokens = tokens

    def signature(self) -> str:
        """The number of tokens is part of it: models with other tokenizers predict other tokens, which cannot be compared."""
        bins = {"bins": BINS} if self.name == "ece" else {}
        return format_signature(self.name, False, over="reference-tokens", tokens=self._count(), **bins)

    def unscorable(self, references: Sequence[str]) -> int:
        """None: every reference has at least its end token."""
        return 0

    def stream(self, predictions: Sequence[str], references: Sequence[str]) -> Iterator[tuple[list[int], Floats]]:
        """The statistics of all examples at once. Raises `CoraError` where the probabilities of the tokens are not known."""
        check_texts(predictions, references)
        if self._tokens is None or len(self._tokens) != len(references):
            raise CoraError(
                f"{self.name} needs the probabilities of the reference tokens, which these predictions come without; evaluate the model "
                "again with --metrics calibration"
            )
        yield list(range(len(references))), np.stack([self._statistics(one) for one in self._tokens])

    def value(self, sums: Floats, n: int) -> Floats:
        """The sum over tokens, or over bins the absolute difference of correct tokens and confidence, divided by the tokens."""
        return np.asarray(np.abs(sums[..., 1:]).sum(axis=-1) / sums[..., 0])

    def example_scores(self, statistics: Floats) -> Floats:
        """The value of each example alone. Those of `ece` do not average to that of all."""
        return self.value(statistics, 1)

    def _statistics(self, tokens: ReferenceTokens) -> Floats:
        """The number of tokens, then the sum of their values, or of correct − confidence in each bin."""
        if self.name != "ece":
            values = np.array(tokens["nll" if self.name == "nll" else "brier"], dtype=np.float64)
            return np.array([len(values), values.sum()])
        confidence, correct = (np.array(tokens[key], dtype=np.float64) for key in ("confidence", "correct"))
        # A bin is open below and closed above, so that full confidence is in the last one.
        bins = np.clip(np.ceil(confidence * BINS) - 1, 0, BINS - 1).astype(int)
        return np.array([len(bins), *np.bincount(bins, weights=correct - confidence, minlength=BINS)])

    def _count(self) -> int:
        return sum(len(one["nll"]) for one in self._tokens or ())


def tokens_of(lines: Sequence[dict[str, object]], where: object) -> Sequence[ReferenceTokens] | None:
    """The `reference_tokens` of predictions; None where none has them. Raises `CoraError`, naming the file, where they are damaged or only
    some have them."""
    found: list[ReferenceTokens] = []
    if all(line.get("reference_tokens") is None for line in lines):
        return None
    for number, line in enumerate(lines, start=1):
        if (tokens := line.get("reference_tokens")) is None:
            raise CoraError(f"{where}, record {number} has no reference_tokens, although others have; evaluate the model again")
        keys = get_type_hints(ReferenceTokens)
        lists = [tokens.get(key) for key in keys] if isinstance(tokens, dict) else []
        complete = [one for one in lists if isinstance(one, list) and one and len(one) == len(lists[0] or ())]
        if len(complete) < len(keys) or not all(isinstance(value, (int, float)) for one in complete for value in one):
            raise CoraError(
                f"{where}, record {number}: reference_tokens must have lists of numbers of equal length: {', '.join(keys)}"
            )
        found.append(tokens)  # type: ignore[arg-type]
    return found
