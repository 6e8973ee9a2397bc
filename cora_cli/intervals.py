"""Bootstrap intervals and paired tests on per-example statistics.

A metric enters as a function of statistics summed over examples. A resample is then a row of counts times the matrix of
statistics, and no text is tokenized again. Whether a difference is significant is left to the caller.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from cora_cli.errors import CoraError, UsageError

Floats = NDArray[np.float64]
Interval = tuple[float, float] | None
"""Both ends of an interval; None for a single example, which says nothing about the spread."""
ValueFunction = Callable[[Floats, int], Floats]
"""`value(sums (..., k), n) -> (...)`: the metric of n examples whose statistics add up to `sums`."""

# Memory limit for one block of resamples; three arrays of this size exist at once.
BLOCK_BYTES = 64 << 20
# Tolerance for two differences that are equal in exact arithmetic; values are on a scale of 1 or 100.
_ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """The difference between systems a and b on the same n examples.

    `difference` is value(a) − value(b), `ci95` its percentile bootstrap interval, `p_value` two-sided.
    """

    difference: float
    ci95: Interval
    p_value: float
    n: int


def bootstrap_sums(statistics: Floats, resamples: int, seed: int) -> Floats:
    """Sum the statistics of resampled examples: (n, k) -> (resamples, k).

    Each resample draws n examples with replacement. The draws depend only on n and `seed`, so two systems, or two metrics, get
    the same resamples. Raises `CoraError` without examples and `UsageError` without resamples.
    """
    n, width = _shape(statistics)
    _check_resamples(resamples)
    generator = np.random.default_rng(seed)
    sums = np.empty((resamples, width))
    for start, stop in _blocks(resamples, n):
        rows = stop - start
        drawn = generator.integers(n, size=(rows, n))
        drawn += n * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        del drawn
        sums[start:stop] = counts.astype(np.float64) @ statistics
    return sums


def percentile_interval(values: Floats, confidence: float = 0.95) -> tuple[float, float]:
    """Central interval of resampled values (resamples,). Raises `UsageError` if `confidence` is not inside (0, 1)."""
    if not 0 < confidence < 1:
        raise UsageError(f"confidence must be between 0 and 1, not {confidence}")
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def bootstrap_interval(
    statistics: Floats, value: ValueFunction, resamples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Percentile bootstrap interval over examples (Efron & Tibshirani 1993, chapter 13).

    `statistics`: (n, k). A single example has none; with identical examples, both ends equal the value exactly. Raises `CoraError` without examples and `UsageError` for invalid settings.
    """
    sums = bootstrap_sums(statistics, resamples, seed)
    return interval_of_sums(statistics, sums, value, confidence)


def interval_of_sums(statistics: Floats, sums: Floats, value: ValueFunction, confidence: float = 0.95) -> Interval:
    """`bootstrap_interval` from the sums (resamples, k) that `bootstrap_sums` computed from `statistics` (n, k)."""
    n = len(statistics)
    if n == 1:
        return None
    if (statistics == statistics[0]).all():
        # Rounding in the sums must not look like a spread.
        sums = statistics.sum(axis=0, keepdims=True)
    return percentile_interval(value(sums, n), confidence)


def paired_difference(
    statistics_a: Floats, statistics_b: Floats, value: ValueFunction, resamples: int = 1000, seed: int = 0
) -> PairedDifference:
    """Compare two systems on the same examples.

    `statistics_a`, `statistics_b`: (n, k), row i of both from example i. The interval comes from the paired bootstrap, the
    p-value from approximate randomisation (Noreen 1989; Riezler & Maxwell 2005): under the null hypothesis the two outputs of
    an example can be swapped, p = (1 + #{|d*| ≥ |d|}) / (1 + resamples). With one example p is 1, because no swap can change
    |d|. Raises `CoraError` if the shapes differ or there are no examples, `UsageError` without resamples.
    """
    if statistics_a.shape != statistics_b.shape:
        raise CoraError(
            f"a paired comparison needs the same examples on both sides, but the statistics have shapes "
            f"{statistics_a.shape} and {statistics_b.shape}"
        )
    n, width = _shape(statistics_a)
    both = np.hstack([statistics_a, statistics_b])
    observed_a, observed_b = (float(value(side.sum(axis=0), n)) for side in (statistics_a, statistics_b))
    difference = observed_a - observed_b

    def difference_of(sums: Floats, count: int) -> Floats:
        return value(sums[..., :width], count) - value(sums[..., width:], count)

    interval = interval_of_sums(both, bootstrap_sums(both, resamples, seed), difference_of)
    # A separate random stream, so that the swaps do not repeat the draws of the bootstrap.
    generator = np.random.default_rng([seed, 1])
    total_a, total_b = statistics_a.sum(axis=0), statistics_b.sum(axis=0)
    tolerance = _ROUNDING * max(1.0, abs(observed_a), abs(observed_b))
    as_extreme = 0
    for start, stop in _blocks(resamples, n):
        swapped = generator.integers(2, size=(stop - start, n))
        moved = swapped.astype(np.float64) @ (statistics_b - statistics_a)
        shuffled = value(total_a + moved, n) - value(total_b - moved, n)
        as_extreme += int((np.abs(shuffled) >= abs(difference) - tolerance).sum())
    return PairedDifference(difference, interval, (1 + as_extreme) / (1 + resamples), n)


def _shape(statistics: Floats) -> tuple[int, int]:
    n, width = statistics.shape
    if n == 0:
        raise CoraError("an interval needs at least one example, not 0")
    return n, width


def _check_resamples(resamples: int) -> None:
    if resamples < 1:
        raise UsageError(f"the number of resamples must be at least 1, not {resamples}")


def _blocks(resamples: int, n: int) -> Iterator[tuple[int, int]]:
    rows = max(1, BLOCK_BYTES // (8 * n))
    for start in range(0, resamples, rows):
        yield start, min(start + rows, resamples)
