"""Bootstrap intervals and paired comparisons of two evaluations on per-example statistics.

A metric enters as a function of statistics summed over examples. A resample is then a row of counts times the matrix of
statistics, and no text is tokenized again. Whether a difference is significant is left to the caller.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from scipy.special import stdtrit

from cora_cli.crossed import Floats, ValueFunction, crossed, pseudo_values
from cora_cli.errors import CoraError, UsageError

Interval = tuple[float, float] | None
"""Both ends of an interval; None where the examples say nothing about the spread: a single one, or several that all agree."""

# Memory limit for one block of resamples; three arrays of this size exist at once.
BLOCK_BYTES = 64 << 20
_ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """The difference between systems a and b on the same n examples.

    `difference` is value(a) − value(b), `ci95` its 95 % interval over examples or None, `p_value` two-sided. Neither includes training seeds.
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

    `statistics`: (n, k). None for a single example and where every resample has the same value, which would make an interval without width.
    Raises `CoraError` without examples and `UsageError` for invalid settings.
    """
    sums = bootstrap_sums(statistics, resamples, seed)
    return interval_of_sums(statistics, sums, value, confidence)


def interval_of_sums(statistics: Floats, sums: Floats, value: ValueFunction, confidence: float = 0.95) -> Interval:
    """`bootstrap_interval` from the sums (resamples, k) that `bootstrap_sums` computed from `statistics` (n, k)."""
    n = len(statistics)
    low, high = percentile_interval(value(sums, n), confidence)
    return None if n == 1 or (statistics == statistics[0]).all() else with_width(low, high)


def with_width(low: float, high: float) -> Interval:
    """The interval, or None if its ends differ by no more than rounding, since nothing is known that exactly from examples."""
    return (low, high) if high - low > _ROUNDING * max(1.0, abs(low), abs(high)) else None


def paired_difference(statistics_a: Floats, statistics_b: Floats, value: ValueFunction) -> PairedDifference:
    """Compare two systems on the same examples, by the t-test with Hall's correction for skewness in `crossed`.

    `statistics_a`, `statistics_b`: (n, k), row i of both from example i. The percentile bootstrap that this replaces covered 90 % at n =
    20. With one example there is no interval, and p is 1. If all examples contribute the same difference, there is none either, and p is
    that of the sign test. Raises `CoraError` if the shapes differ or there are no examples.
    """
    if statistics_a.shape != statistics_b.shape:
        raise CoraError(
            f"a paired comparison needs the same examples on both sides, but the statistics have shapes "
            f"{statistics_a.shape} and {statistics_b.shape}"
        )
    n, _ = _shape(statistics_a)
    contributions = pseudo_values(statistics_a, value) - pseudo_values(statistics_b, value)
    difference = float(value(statistics_a.sum(axis=0), n) - value(statistics_b.sum(axis=0), n))
    if n == 1:
        return PairedDifference(difference, None, 1.0, n)
    # Rounding must not look like a spread; values are on a scale of 1 or 100.
    if np.ptp(contributions) <= _ROUNDING * max(1.0, float(np.abs(contributions).max())):
        same = abs(difference) <= _ROUNDING
        return PairedDifference(difference, None, 1.0 if same else 0.5 ** (n - 1), n)
    found = crossed([contributions[None]])
    low, high = found.interval(0.95)
    return PairedDifference(difference, (float(low), float(high)), float(found.p_value()), n)


def ratio_interval(numerators: Floats, denominators: Floats, confidence: float = 0.95) -> Interval:
    """The interval of the ratio of two means over the same n examples, (n,) each, by Fieller's theorem (1954).

    It holds the ratios ρ for which the mean of numerator − ρ·denominator is not shown to differ from zero by Student's t. None where the
    mean denominator itself is not shown to differ from zero (`has_ratio`), so that every ratio is possible, and where all examples have
    the same ratio.
    """
    if not has_ratio(denominators, confidence):
        return None
    n = len(denominators)
    above, below = float(numerators.mean()), float(denominators.mean())
    spread = np.cov(numerators, denominators) * (float(stdtrit(n - 1, (1 + confidence) / 2)) ** 2 / n)
    # ρ²·a − 2ρ·b + c ≤ 0
    a, b, c = below**2 - spread[1, 1], above * below - spread[0, 1], above**2 - spread[0, 0]
    if np.ptp(numerators - above / below * denominators) <= _ROUNDING * max(1.0, float(np.abs(numerators).max())):
        return None
    half = math.sqrt(max(0.0, b * b - a * c))
    return float((b - half) / a), float((b + half) / a)


def has_ratio(denominators: Floats, confidence: float = 0.95) -> bool:
    """Whether the mean of the denominators (n,) is shown to differ from zero by Student's t, so that a ratio to it means something."""
    n = len(denominators)
    if n < 2:
        return False
    spread = float(denominators.var(ddof=1)) * float(stdtrit(n - 1, (1 + confidence) / 2)) ** 2 / n
    return float(denominators.mean()) ** 2 - spread > 0


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
