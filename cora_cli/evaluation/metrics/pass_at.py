"""pass@k: the chance that one of k programs passes the tests of its problem, estimated without bias from n ≥ k of them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cora_cli.errors import CoraError
from cora_cli.evaluation.metrics.base import Floats, StreamingMetric, format_signature


@dataclass(frozen=True)
class Attempts:
    """How many programs were run for each problem, how many of them passed, and what else moves the number."""

    samples: Sequence[int]
    passed: Sequence[int]
    conditions: str


class PassAt(StreamingMetric):
    """The mean over problems of 1 − C(n − c, k) / C(n, k), where c of n programs passed (Chen et al. 2021, 2107.03374, equation 1)."""

    blind_spot = ""

    def __init__(self, k: int, attempts: Attempts | None) -> None:
        self.k, self.name, self._attempts = k, f"pass@{k}", attempts

    def stream(self, predictions: Sequence[str], references: Sequence[str]) -> Iterator[tuple[list[int], Floats]]:
        """See `StreamingMetric`. Raises `CoraError` if the programs were not run, or fewer than k of a problem."""
        if self._attempts is None or len(self._attempts.samples) != len(predictions):
            raise CoraError(f"{self.name} needs the results of running the programs, which are missing")
        pairs = list(zip(self._attempts.samples, self._attempts.passed, strict=True))
        if fewest := next((n for n, _ in pairs if n < self.k), None):
            raise CoraError(
                f"{self.name} needs at least {self.k} samples of every problem, but there are {fewest}; use --samples {self.k}"
            )
        values = [1 - math.comb(n - c, self.k) / math.comb(n, self.k) for n, c in pairs]
        yield list(range(len(pairs))), np.array(values)[:, None]

    def signature(self) -> str:
        """Samples of each problem, and how they were run."""
        numbers = sorted(set(self._attempts.samples)) if self._attempts else []
        conditions = self._attempts.conditions if self._attempts else ""
        return f"{format_signature(self.name, False, samples='-'.join(map(str, numbers)))}|{conditions}"

    def unscorable(self, references: Sequence[str]) -> int:
        """None: every problem carries tests."""
        return 0
