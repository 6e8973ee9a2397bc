"""The correlation of a measure with the loss and its interval over bases and seeds, where the truth is planted."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from cora_cli.errors import CoraError
from cora_cli.inspection.rank_correlation import Correlation, Stratum, correlate, rank_correlation

BASES, SEEDS = 12, 3


def drawn(generator: np.random.Generator, relation: float, noise: float, bases: int = BASES) -> Stratum:
    """Bases whose loss falls with the value as much as `relation` (0-1) says, and seeds that add `noise`."""
    values, rest = generator.standard_normal((2, bases))
    losses = -relation * values + np.sqrt(1 - relation**2) * rest
    return Stratum(np.tile(values[:, None], SEEDS), losses[:, None] + noise * generator.standard_normal((bases, SEEDS)))


def test_ranks_with_ties_are_correlated_as_scipy_does():
    generator = np.random.default_rng(0)
    one, other = generator.integers(0, 5, (2, 20, 9))
    expected = [spearmanr(first, second).statistic for first, second in zip(one, other, strict=True)]
    np.testing.assert_allclose(rank_correlation(one, other), expected)
    assert np.isnan(rank_correlation(np.ones(4), np.arange(4)))


def test_a_loss_that_falls_with_the_measure_has_correlation_one_and_is_earned():
    generator = np.random.default_rng(1)
    strata = {}
    for name in ("code, fb", "code, tb", "sql, fb"):
        values = np.tile(generator.standard_normal((BASES, 1)), SEEDS)
        # Losses of different strata have other levels and scales, which do not count.
        strata[name] = Stratum(values, generator.uniform(1, 3) - generator.uniform(0.1, 1) * values**3)
    found = correlate(strata)
    assert found.rho == pytest.approx(1)
    assert found.interval == pytest.approx((1, 1))
    assert found.strata == pytest.approx(dict.fromkeys(strata, 1))
    assert found.is_earned
    worse = correlate({name: Stratum(stratum.values, -stratum.losses) for name, stratum in strata.items()})
    assert worse.rho == pytest.approx(-1)
    assert not worse.is_earned


def test_a_shuffled_measure_has_an_interval_around_zero():
    generator = np.random.default_rng(2)
    strata = {f"{n}": drawn(generator, 0.95, 0.1) for n in range(6)}
    shuffled = {name: Stratum(generator.permutation(one.values), one.losses) for name, one in strata.items()}
    assert correlate(strata).interval[0] > 0.5
    found = correlate(shuffled)
    assert found.interval[0] < 0 < found.interval[1]
    assert not found.is_earned


@pytest.mark.parametrize("relation", [0.6, *(pytest.param(relation, marks=pytest.mark.slow) for relation in (0.0, 0.9))])
def test_the_interval_holds_the_true_correlation_at_least_as_often_as_it_says(relation):
    generator = np.random.default_rng(3)
    made = [{name: drawn(generator, relation, 0.3) for name in ("fb", "tb")} for _ in range(1500)]
    true = np.mean([rank_correlation(one.values.mean(1), -one.losses.mean(1)) for strata in made for one in strata.values()])
    found = [correlate(strata, resamples=300, seed=n).interval for n, strata in enumerate(made[:300])]
    assert np.mean([low <= true <= high for low, high in found]) >= 0.94
    assert np.mean([low > true for low, _ in found]) <= 0.04, "too high an interval would earn what is not there"


def test_what_a_seed_adds_to_all_bases_alike_changes_nothing():
    one = drawn(np.random.default_rng(4), 0.7, 0.1)
    shifted = Stratum(one.values, one.losses + np.array([0.0, 5.0, -9.0]))
    assert correlate({"fb": shifted}).interval == pytest.approx(correlate({"fb": one}).interval)


def test_noise_between_seeds_and_fewer_bases_widen_the_interval():
    def width(found: Correlation) -> float:
        return found.interval[1] - found.interval[0]

    generator = np.random.default_rng(5)
    quiet = drawn(generator, 1.0, 0.0)
    noisy = Stratum(quiet.values, quiet.losses + generator.standard_normal(quiet.losses.shape))
    assert width(correlate({"fb": quiet})) == pytest.approx(0)
    assert width(correlate({"fb": noisy})) > 0.1
    many, few = (drawn(generator, 0.7, 0.1, bases) for bases in (60, 8))
    assert width(correlate({"fb": few})) > 1.5 * width(correlate({"fb": many}))


def test_a_stratum_that_repeats_another_proves_nothing_more():
    one = drawn(np.random.default_rng(6), 0.7, 0.0)
    alone, twice = correlate({"fb": one}), correlate({"fb": one, "tb": one})
    assert twice.interval == pytest.approx(alone.interval, abs=1e-9), "the same bases are drawn for all strata"


def test_too_few_bases_and_bases_that_are_alike_are_refused():
    generator = np.random.default_rng(7)
    with pytest.raises(CoraError, match="needs at least 4 bases, and there are 3"):
        correlate({"fb": drawn(generator, 0.5, 0.1, 3)})
    one = drawn(generator, 0.5, 0.1)
    with pytest.raises(CoraError, match="all 12 bases are alike in code, fb"):
        correlate({"code, fb": Stratum(np.ones_like(one.values), one.losses)})
    with pytest.raises(ValueError, match="same bases and seeds"):
        correlate({"fb": one, "tb": drawn(generator, 0.5, 0.1, 5)})
