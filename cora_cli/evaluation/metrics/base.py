"""What every metric is: per-example statistics, a value of their sums, and a signature.

It holds the interface and the checks of the input that all metrics share; it computes no metric.
"""

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from cora_cli.errors import CoraError

Floats = NDArray[np.float64]


class Metric(ABC):
    """A corpus metric that is a function of statistics summed over examples, so that it can be resampled."""

    name: str

    @abstractmethod
    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> Floats:
        """Sufficient statistics of each example: (n, k). Rows do not depend on each other.

        Raises `CoraError` as `check_texts` does.
        """

    @abstractmethod
    def signature(self) -> str:
        """Everything that moves the number, as `name|key:value|...`."""

    def value(self, sums: Floats, n: int) -> Floats:
        """The metric of n examples whose statistics add up to `sums`: (..., k) -> (...). Here the mean over examples."""
        return np.asarray(sums[..., 0] / n)

    def example_scores(self, statistics: Floats) -> Floats:
        """A score for each single example, (n, k) -> (n,), on the scale of `value`."""
        return statistics[:, 0]


class StreamingMetric(Metric):
    """A metric that wants all examples at once and takes them in an order of its own, such as by length for an encoder."""

    @abstractmethod
    def stream(self, predictions: Sequence[str], references: Sequence[str]) -> Iterator[tuple[list[int], Floats]]:
        """Indices of examples, m of them, and their statistics (m, k), until every example was there once.

        Raises `CoraError` as `check_texts` does.
        """

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> Floats:
        """`stream` in the order of the examples: (n, k)."""
        return in_order(list(self.stream(predictions, references)))


def in_order(blocks: Sequence[tuple[list[int], Floats]]) -> Floats:
    """Put the rows of a `stream` in the order of the examples: (n, k)."""
    rows = np.concatenate([rows for _, rows in blocks])
    ordered = np.empty_like(rows)
    ordered[[index for indices, _ in blocks for index in indices]] = rows
    return ordered


def check_texts(predictions: Sequence[str], references: Sequence[str]) -> None:
    """Refuse what no metric is defined on.

    Raises `CoraError` where the counts differ, nothing is given, or an entry is not a string of valid Unicode.
    """
    if len(predictions) != len(references):
        raise CoraError(
            f"every prediction needs its reference, but there are {len(predictions)} predictions and {len(references)} references"
        )
    if len(predictions) == 0:
        raise CoraError("there is nothing to score: 0 predictions and 0 references were given")
    for kind, texts in (("prediction", predictions), ("reference", references)):
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise CoraError(f"{kind} {index} is no text but {type(text).__name__}: {str(text)[:60]!r}")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise CoraError(
                    f"{kind} {index} is not valid Unicode (it holds half of a surrogate pair): {text[:60]!r}"
                ) from error


def package_version(package: str) -> str:
    """Installed version of a distribution; the modules' own `__version__` is not always right (bert-score's is not)."""
    return importlib.metadata.version(package)


def format_signature(name: str, **fields: object) -> str:
    """`name|key:value|...`; underscores in keys become hyphens."""
    return "|".join([name, *(f"{key.replace('_', '-')}:{value}" for key, value in fields.items())])
