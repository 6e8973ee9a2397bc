"""Inference on a difference between two methods whose training seeds are crossed with the evaluated records.

The model is a two-way layout with random effects. d[s, r] is the contribution of record r to the difference at seed s:

    d[s, r] = difference + seed[s] + record[r] + interaction[s, r]

The mean of the S × R contributions has the variance σ²_seed / S + σ²_record / R + σ²_interaction / (S·R), estimated without bias by
(MS_seed + MS_record − MS_error) / (S·R), the quasi-F denominator of Clark (1973, "The language-as-fixed-effect fallacy") and of Obuchowski
and Rockette (1995) for readers crossed with cases.

Satterthwaite's (1946) degrees of freedom suit an estimate of known accuracy. With three seeds a variance that is too small by chance also
gets too many degrees of freedom, so in the tails, where Holm's correction reads the distribution, such a test is larger than it says. The
seed variance is therefore integrated over, as by Behrens and Fisher and in the generalised intervals of Weerahandi (1993): given MS_seed, the
seed part of the variance is MS_seed·ν / χ²_ν less the interaction, and never below zero. Given it, the rest is Student's t with
Satterthwaite's degrees of freedom, corrected for the kurtosis of the records. Where one component dominates, the result is Student's t with
that component's degrees of freedom. Records are skewed, so the studentised difference first passes through Hall's (1992) cubic
transformation. A hierarchical bootstrap would need thousands of resamples for a p-value that survives the correction, and has only
S^S resamples of S seeds. `docs/verdict.md` has the measured sizes and coverages.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaincinv, ndtri, stdtr

from cora_cli.errors import CoraError

Floats = NDArray[np.float64]
ValueFunction = Callable[[Floats, int], Floats]
"""`value(sums (..., k), n) -> (...)`: the metric of n examples whose statistics add up to `sums`."""

# Nodes of the integral over the seed variance, denser where χ² is small: the tails of the result come from there.
_PLACES, _WEIGHTS = np.polynomial.legendre.leggauss(48)
_UNIFORM, _WEIGHTS = ((_PLACES + 1) / 2) ** 4, 2 * ((_PLACES + 1) / 2) ** 3 * _WEIGHTS
# Chosen by simulation: the intervals cover 93 to 97 % of true differences from three seeds on.
_TILT = 0.5
# Bisections of an interval's end; each halves the error, which starts at about twenty standard errors or less.
_BISECTIONS = 50
_SECANTS = 12


@dataclasses.dataclass(frozen=True, eq=False)
class Crossed:
    """The difference and the parts of its variance, each an array (...) over independent comparisons.

    `seed`, `record` and `interaction` add up to the variance of the difference: σ²_seed / S, σ²_record / R and σ²_interaction / (S·R).
    `seed_mean_square` and `record_mean_square` are mean squares on the same scale; each also holds the interaction. `seed_df` is 0 where
    no side has two seeds; the variance is then that over records alone. `third` is the third cumulant of the difference, from records.
    """

    difference: Floats
    seed_mean_square: Floats
    record_mean_square: Floats
    interaction: Floats
    third: Floats
    seed_df: Floats
    record_df: Floats

    @property
    def seed(self) -> Floats:
        """The part of the variance that more seeds reduce."""
        return np.maximum(self.seed_mean_square - self.interaction, 0.0)

    @property
    def record(self) -> Floats:
        """The part of the variance that more records reduce."""
        return np.maximum(self.record_mean_square - self.interaction, 0.0)

    @property
    def variance(self) -> Floats:
        """The variance of the difference. It is at least the larger of the two mean squares, since each estimates a part of it."""
        return self.record_mean_square + self.seed

    def enlarged(self, seeds: tuple[int, Floats], records: tuple[int, Floats]) -> "Crossed":
        """What a single comparison would be with other numbers of seeds and records, (those now, an array (...) of those then) each.

        The difference and the effects stay as estimated. With fewer than two seeds now, only the records can change.
        """
        by_seed, by_record = seeds[0] / seeds[1], records[0] / records[1]
        interaction = self.interaction * by_seed * by_record
        return Crossed(
            self.difference + np.zeros_like(interaction),
            self.seed * by_seed + interaction,
            self.record * by_record + interaction,
            interaction,
            self.third * by_record**2,
            self.seed_df * (seeds[1] - 1) / max(seeds[0] - 1, 1),
            self.record_df * (records[1] - 1) / (records[0] - 1),
        )

    @functools.cached_property
    def _nodes(self) -> tuple[Floats, Floats]:
        return _nodes(self.seed_df.flat[0] if np.ptp(self.seed_df) == 0 else self.seed_df)

    def p_value(self, at: Floats | float = 0.0) -> Floats:
        """Two-sided p-values (...) of the hypotheses that the true differences are `at`; NaN where nothing varies.

        The larger of the values with and without the correction for skewness, which estimates three moments from few records. With
        normal records and many tests, the correction alone would reject too often.
        """
        return np.maximum(*(2 * np.minimum(below, 1 - below) for below in (self._below(at), self._below(at, skewed=False))))

    def interval(self, confidence: float) -> tuple[Floats, Floats]:
        """Both ends (...) of the equal-tailed interval of the difference; NaN where nothing varies."""
        low, high = (self._quantile(share) for share in ((1 + confidence) / 2, (1 - confidence) / 2))
        return low, high

    def covered(self, truth: Floats | float, confidence: Floats | float) -> NDArray[np.bool_]:
        """Whether `interval` includes `truth`, without computing its ends."""
        below = self._below(truth, _TILT)
        return np.asarray(np.minimum(below, 1 - below) >= (1 - confidence) / 2)

    def _below(self, at: Floats | float, tilt: float = 0.0, skewed: bool = True) -> Floats:
        """The probability (...) of a difference below the observed one if the true one is `at`.

        `tilt` 0 leaves the seed variance the prior 1/σ², which makes tests cautious where neither component dominates. A larger one
        multiplies the prior by (1 + record part / seed part)^tilt, which prefers a small seed part where the records' is large.
        """
        ratio, weights = self._nodes
        records, interaction = self.record_mean_square[..., None], self.interaction[..., None]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            seeds = self.seed_mean_square[..., None] / ratio
            variance = records + np.maximum(seeds - interaction, 0.0)
            if tilt:
                weights = weights * np.where(seeds > 0, (1 + records / seeds) ** tilt, 1.0)
                weights = weights / weights.sum(axis=-1, keepdims=True)
            freedom = np.minimum(self.record_df[..., None] * (variance / records) ** 2, 1e10)
            shifted = (self.difference - at)[..., None] / np.sqrt(variance)
            if skewed:
                skewness = self.third[..., None] / variance**1.5
                shifted = shifted + skewness * (shifted**2 / 3 + 1 / 6) + skewness**2 * shifted**3 / 27
            return np.asarray((stdtr(np.where(np.isnan(freedom), 1e10, freedom), shifted) * weights).sum(axis=-1))

    def _quantile(self, share: float) -> Floats:
        """The true differences (...) at which `_below` is `share`, by bisection.

        `_below` never rises with the true difference, so a step of the bisection outside of `_enclosed` has a known outcome.
        """
        scale = np.sqrt(self.variance)
        reach = np.where(self.seed_df > 0, 1e3, 30.0) * scale
        low, high = self.difference - reach, self.difference + reach
        above_until, below_from = self._enclosed(share, scale, 4 * reach * 0.5**_BISECTIONS)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            above = middle <= above_until
            if not (above | (middle >= below_from)).all():
                above = np.where(above | (middle >= below_from), above, self._below(middle, _TILT) > share)
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        return np.where(scale > 0, (low + high) / 2, np.nan)

    def _enclosed(self, share: float, scale: Floats, width: Floats) -> tuple[Floats, Floats]:
        """True differences (...) at which `_below` was found to be above `share`, and not above; mostly about `width` apart.

        The secant method on the normal quantile of `_below`, which is nearly a straight line.
        """
        target = float(ndtri(share))
        above_until, below_from = np.full_like(scale, -np.inf), np.full_like(scale, np.inf)
        at, last = self.difference - target * scale, self.difference
        value = np.zeros_like(scale)  # of `last`, where the probability is about one half

        def look(place: Floats) -> Floats:
            nonlocal above_until, below_from
            found = self._below(place, _TILT)
            above_until = np.where(found > share, np.maximum(above_until, place), above_until)
            below_from = np.where(found > share, below_from, np.minimum(below_from, place))
            return np.asarray(ndtri(found))

        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            for _ in range(_SECANTS):
                found = look(at)
                step = (target - found) * (at - last) / (found - value)
                if not (np.abs(step) > width / 8).any():
                    break
                last, value = at, found
                at = np.where(np.isfinite(step), at + np.clip(step, -10 * scale, 10 * scale), at)
            for side in (-1, 1):
                look(at + side * width)
        return above_until, below_from


def crossed(sides: Sequence[Floats]) -> Crossed:
    """Decompose the difference between the `sides`, each (..., S, R) with the same R records and no fewer than two.

    One side holds contributions that are differences already, with the same seeds on both sides. Two sides have seeds of their own, and
    the difference is the first minus the second; their seed parts add up, with Welch's degrees of freedom. A side with a single seed
    contributes no seed part. Raises `CoraError` with fewer than two records or different numbers of them.
    """
    counts = {side.shape[-1] for side in sides}
    if len(counts) != 1 or min(counts) < 2:
        raise CoraError(f"a comparison needs the same records on both sides, and at least two, not {sorted(counts)}")
    (count,) = counts
    by_record = sides[0].mean(axis=-2) - (sides[1].mean(axis=-2) if len(sides) > 1 else 0.0)
    difference = by_record.mean(axis=-1)
    centred = by_record - difference[..., None]
    record_mean_square = (centred**2).sum(axis=-1) / (count * (count - 1))
    # The unbiased third cumulant of one record, divided for the mean of `count` records.
    third = (centred**3).sum(axis=-1) / ((count - 1) * max(count - 2, 1) * count)
    seeds = interaction = weight = np.zeros_like(difference)
    for side in sides:
        repeats = side.shape[-2]
        if repeats < 2:
            continue
        by_seed = side.mean(axis=-1, keepdims=True)
        overall = by_seed.mean(axis=-2, keepdims=True)
        residual = side - by_seed - side.mean(axis=-2, keepdims=True) + overall
        part = ((by_seed - overall) ** 2).sum(axis=(-2, -1)) / (repeats * (repeats - 1))
        interaction = interaction + (residual**2).sum(axis=(-2, -1)) / (repeats * (repeats - 1) * count * (count - 1))
        seeds, weight = seeds + part, weight + part**2 / (repeats - 1)
    most = sum(side.shape[-2] - 1 for side in sides)
    with np.errstate(divide="ignore", invalid="ignore"):
        seed_df = np.where(weight > 0, seeds**2 / weight, float(most))
    return Crossed(difference, seeds, record_mean_square, interaction, third, seed_df, _record_df(centred))


def stacked(comparisons: Sequence[Crossed]) -> Crossed:
    """Single comparisons as one array of them, whose intervals take far less time than those of one after another."""
    names = [field.name for field in dataclasses.fields(Crossed)]
    return Crossed(*(np.array([getattr(one, name) for one in comparisons]) for name in names))


def pseudo_values(statistics: Floats, value: ValueFunction) -> Floats:
    """What each record contributes to a value: (..., R, k) statistics -> (..., R) numbers whose mean is exactly the value.

    These are the pseudo-values of the jackknife (Tukey 1958), shifted to the value's mean. For a mean over records they are the records'
    own numbers; for a ratio of sums or corpus BLEU they linearise the value, so that one model serves all measures.
    """
    count = statistics.shape[-2]
    sums = statistics.sum(axis=-2, keepdims=True)
    whole = value(sums, count)
    if count < 2:
        return whole
    without = value(sums - statistics, count - 1)
    return whole + (count - 1) * (without.mean(axis=-1, keepdims=True) - without)


def _record_df(centred: Floats) -> Floats:
    """Degrees of freedom (...) of the mean square of centred records (..., R): 2·E² / Var of the variance, with its kurtosis (Box 1953).

    The excess kurtosis counts one and a half times, since few records of a distribution with long tails mostly lack its tails.
    """
    count = centred.shape[-1]
    if count < 4:
        return np.full(centred.shape[:-1], count - 1.0)
    squares = (centred**2).mean(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        plain = (centred**4).mean(axis=-1) / squares**2 - 3
    kurtosis = (count - 1) / ((count - 2) * (count - 3)) * ((count + 1) * plain + 6)
    return 2 / (2 / (count - 1) + 1.5 * np.maximum(np.nan_to_num(kurtosis), 0.0) / count)


def _nodes(freedom: Floats | float) -> tuple[Floats, Floats]:
    """Nodes χ²_ν / ν and weights of an integral over χ² with `freedom` ν (...); ν of 0 stands for no seeds, so any will do."""
    half = np.asarray(np.where(np.asarray(freedom) > 0, freedom, 1.0))[..., None] / 2
    return gammaincinv(half, _UNIFORM) / half, _WEIGHTS
