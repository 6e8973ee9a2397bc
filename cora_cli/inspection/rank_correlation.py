"""How well something that is known before training orders bases by the loss that they reach: a rank correlation with its interval.

Losses of different data sets or modes do not compare, so the correlation is taken within each stratum, and the mean over the strata is reported.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from cora_cli.errors import CoraError

ENOUGH, LEAST = 0.8, 0.5
"""A prediction is earned where the correlation is at least `ENOUGH` and the lower end of its interval above `LEAST`."""
FEWEST_BASES = 4
RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Stratum:
    """The bases of one data set and mode. `values` and `losses` are (bases, seeds): what was known before, and the held-out loss.

    A value that no seed changes is repeated.
    """

    values: np.ndarray
    losses: np.ndarray


@dataclasses.dataclass(frozen=True)
class Correlation:
    """Spearman's ρ between the value and the negative loss: 1 where a larger value always means a lower loss.

    `rho` is the mean over the strata, and `interval` (95 %) covers bases and seeds. `strata` has the ρ of each.
    """

    rho: float
    interval: tuple[float, float]
    strata: dict[str, float]
    bases: int
    seeds: int

    @property
    def is_earned(self) -> bool:
        """Whether the value may be called a prediction."""
        return self.rho >= ENOUGH and self.interval[0] > LEAST


def rank_correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Spearman's ρ along the last axis, ties by their mean rank; NaN where all of either are equal."""
    from scipy.stats import rankdata

    first, second = (rankdata(values, axis=-1) for values in (one, other))
    first, second = (ranks - ranks.mean(axis=-1, keepdims=True) for ranks in (first, second))
    with np.errstate(invalid="ignore"):
        found = (first * second).sum(axis=-1) / np.sqrt((first**2).sum(axis=-1) * (second**2).sum(axis=-1))
    return np.clip(found, -1.0, 1.0)


def correlate(strata: Mapping[str, Stratum], resamples: int = RESAMPLES, seed: int = 0) -> Correlation:
    """The correlation over `strata`, all of which have the same bases in the same order, and the same seeds.

    The interval is the bootstrap's: each resample draws bases, the same ones for all strata, and within each of them seeds. What a seed adds to the
    loss of all bases of a stratum alike, such as by the order of its data, is no noise between them and is subtracted before.

    Raises `CoraError` for fewer than four bases, and where all values or all losses of a stratum are equal.
    """
    (bases, seeds), *others = {stratum.losses.shape for stratum in strata.values()} | {
        stratum.values.shape for stratum in strata.values()
    }
    if others:
        raise ValueError("all strata need the same bases and seeds")
    if bases < FEWEST_BASES:
        raise CoraError(f"a rank correlation needs at least {FEWEST_BASES} bases, and there are {bases}")
    found = {
        name: float(rank_correlation(stratum.values.mean(axis=1), -stratum.losses.mean(axis=1)))
        for name, stratum in strata.items()
    }
    if alike := [name for name, rho in found.items() if np.isnan(rho)]:
        raise CoraError(f"all {bases} bases are alike in {alike[0]}, so there is no rank correlation")
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, bases, (resamples, bases))
    total = np.zeros(resamples)
    for stratum in strata.values():
        centred = stratum.losses - stratum.losses.mean(axis=0)
        picked = generator.integers(0, seeds, (resamples, bases, seeds))
        values, losses = (np.take_along_axis(matrix[None], picked, axis=2).mean(axis=2) for matrix in (stratum.values, centred))
        # A basis that is drawn twice has the same seeds twice: otherwise its equal values could not be in the order of its losses.
        total += rank_correlation(*(np.take_along_axis(drawn_of, drawn, axis=1) for drawn_of in (values, -losses)))
    low, high = np.nanpercentile(total / len(strata), [2.5, 97.5])
    rho = float(np.mean(list(found.values())))
    # Drawing seeds adds their noise a second time, which can leave the estimate itself outside.
    return Correlation(rho, (min(float(low), rho), max(float(high), rho)), found, bases, seeds)
