"""The interface of all metrics: per-example statistics, a value computed from their sums, and a signature.

It also has the input checks that all metrics share.
"""

import importlib.metadata
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from cora_cli.errors import CoraError

Floats = NDArray[np.float64]
HF_EVALUATE = "hf-evaluate"
"""The variant in which each metric is what `evaluate.load(...)` of Hugging Face computes by default."""
_LONGEST_WORD = 4
"""Letters of such scripts to a word, on average, in texts that are divided into words."""
# Thai, Lao, Burmese, Khmer, kana, and Chinese characters.
_WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]"
)


def has_no_spaces(text: str) -> bool:
    """Whether more than half of a text is in scripts without spaces between words and not divided into words, so that a phrase counts as one."""
    words = text.split()
    letters = len(_WITHOUT_SPACES.findall(text))
    return 2 * letters > len("".join(words)) and letters > _LONGEST_WORD * len(words)


class Metric(ABC):
    """A corpus metric computed from statistics summed over examples, so that bootstrap resamples need no recomputation."""

    name: str

    @abstractmethod
    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> Floats:
        """Sufficient statistics of each example: (n, k). Rows are independent of each other.

        Raises `CoraError` as `check_texts` does.
        """

    @abstractmethod
    def signature(self) -> str:
        """Everything that affects the value, as `name|key:value|...`."""

    def fetch(self) -> None:  # noqa: B027 (most metrics read nothing)
        """Fetch what the metric reads, such as an encoder. Raises `CoraError` if it cannot be found or downloaded."""

    blind_spot: str
    """What `unscorable` references have in common, to end a sentence with that begins "3 of 8 references"."""

    @abstractmethod
    def unscorable(self, references: Sequence[str]) -> int:
        """The number of references in which the metric sees nothing to compare, so that their scores say nothing."""

    def as_evaluate_prints(self, statistics: Floats, seed: int) -> float | None:
        """The number that `evaluate` prints, where that is a random one (ROUGE); else None, because it is `value`."""
        return None

    def value(self, sums: Floats, n: int) -> Floats:
        """The metric of n examples whose statistics sum to `sums`: (..., k) -> (...). By default the mean over examples."""
        return np.asarray(sums[..., 0] / n)

    def example_scores(self, statistics: Floats) -> Floats:
        """One score per example, (n, k) -> (n,), on the scale of `value`."""
        return statistics[:, 0]


class StreamingMetric(Metric):
    """A metric that processes all examples in its own order, such as by length for an encoder."""

    @abstractmethod
    def stream(self, predictions: Sequence[str], references: Sequence[str]) -> Iterator[tuple[list[int], Floats]]:
        """Yield the indices of m examples and their statistics (m, k), until every example has been yielded once.

        Raises `CoraError` as `check_texts` does.
        """

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> Floats:
        """`stream` in the order of the examples: (n, k)."""
        return in_order(list(self.stream(predictions, references)))


def in_order(blocks: Sequence[tuple[list[int], Floats]]) -> Floats:
    """Sort the rows of a `stream` into the order of the examples: (n, k)."""
    rows = np.concatenate([rows for _, rows in blocks])
    ordered = np.empty_like(rows)
    ordered[[index for indices, _ in blocks for index in indices]] = rows
    return ordered


def check_texts(predictions: Sequence[str], references: Sequence[str]) -> None:
    """Check the input of a metric.

    Raises `CoraError` if the counts differ, nothing is given, or an entry is not a string of valid Unicode.
    """
    if len(predictions) != len(references):
        raise CoraError(
            f"every prediction needs one reference, but there are {len(predictions)} predictions and {len(references)} "
            "references"
        )
    if len(predictions) == 0:
        raise CoraError("nothing to score: there are 0 predictions and 0 references")
    for kind, texts in (("prediction", predictions), ("reference", references)):
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise CoraError(f"{kind} {index} must be text, not {type(text).__name__}: {str(text)[:60]!r}")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise CoraError(f"{kind} {index} is not valid Unicode (it has an unpaired surrogate): {text[:60]!r}") from error


def package_version(package: str) -> str:
    """Installed version of a distribution. A module's `__version__` can be wrong, as bert-score's is."""
    return importlib.metadata.version(package)


def format_signature(name: str, as_evaluate: bool, **fields: object) -> str:
    """`name|key:value|...`; underscores in keys become hyphens. A signature that names no variant is of the variant `ours`."""
    variant = [f"variant:{HF_EVALUATE}"] if as_evaluate else []
    return "|".join([name, *variant, *(f"{key.replace('_', '-')}:{value}" for key, value in fields.items())])
