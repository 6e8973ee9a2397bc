import itertools
import tracemalloc

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from cora_cli import intervals
from cora_cli.errors import CoraError, UsageError
from cora_cli.intervals import bootstrap_interval, bootstrap_sums, paired_difference


def mean(sums, n):
    return sums[..., 0] / n


def ratio(sums, n):
    return sums[..., 0] / sums[..., 1]


def sample(n, width=2, seed=3):
    return np.random.default_rng(seed).uniform(0.1, 1.0, size=(n, width))


def drawn_examples(n, resamples, seed):
    generator = np.random.default_rng(seed)
    return [generator.integers(n, size=n) for _ in range(resamples)]


@pytest.mark.parametrize("value", [mean, ratio])
def test_the_interval_is_that_of_an_explicit_loop_over_resampled_examples(value):
    statistics = sample(37)
    values = [value(statistics[chosen].sum(axis=0), 37) for chosen in drawn_examples(37, 200, seed=5)]
    expected = np.quantile(values, [0.05, 0.95])
    assert bootstrap_interval(statistics, value, resamples=200, seed=5, confidence=0.9) == pytest.approx(expected, rel=1e-12)


def test_the_interval_is_close_to_that_of_scipy():
    statistics = sample(400, width=1)
    reference = scipy.stats.bootstrap((statistics[:, 0],), np.mean, n_resamples=4000, method="percentile", rng=1)
    expected = reference.confidence_interval
    width = expected.high - expected.low
    low, high = bootstrap_interval(statistics, mean, resamples=4000)
    assert low == pytest.approx(expected.low, abs=0.05 * width)
    assert high == pytest.approx(expected.high, abs=0.05 * width)


def test_every_resample_draws_as_many_examples_as_there_are():
    assert (bootstrap_sums(np.ones((23, 1)), 50, seed=0) == 23).all()


def test_resampling_in_small_blocks_changes_nothing(monkeypatch):
    statistics = sample(50)
    whole = bootstrap_sums(statistics, 64, seed=1)
    other = paired_difference(statistics, sample(50, seed=4), mean, 64, seed=1)
    monkeypatch.setattr(intervals, "BLOCK_BYTES", 3 * 8 * 50)
    np.testing.assert_allclose(bootstrap_sums(statistics, 64, seed=1), whole, rtol=1e-13)
    assert paired_difference(statistics, sample(50, seed=4), mean, 64, seed=1).p_value == other.p_value


def test_two_metrics_see_the_same_resamples():
    statistics = sample(40, width=3)
    together = bootstrap_sums(statistics, 30, seed=9)
    np.testing.assert_allclose(together[:, 1:2], bootstrap_sums(statistics[:, 1:2], 30, seed=9), rtol=1e-13)


def test_many_examples_need_bounded_memory():
    statistics = np.ones((200_000, 1))
    tracemalloc.start()
    bootstrap_sums(statistics, 100, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300e6  # in one block the draws, their counts and those as floats would be 160 MB each


def test_without_variance_the_interval_is_the_value():
    statistics = np.full((7, 1), 0.1)
    value = float(mean(statistics.sum(axis=0), 7))
    assert bootstrap_interval(statistics, mean, resamples=20) == (value, value)


def test_a_single_example_has_no_interval():
    assert bootstrap_interval(np.full((1, 1), 0.1), mean, resamples=20) is None
    assert paired_difference(np.ones((1, 1)), np.zeros((1, 1)), mean, resamples=20).ci95 is None


def test_seeds_repeat_and_differ():
    statistics = sample(30)
    assert bootstrap_interval(statistics, mean, 50, seed=1) == bootstrap_interval(statistics, mean, 50, seed=1)
    assert bootstrap_interval(statistics, mean, 50, seed=1) != bootstrap_interval(statistics, mean, 50, seed=2)


@pytest.mark.parametrize(("resamples", "confidence"), [(0, 0.95), (10, 0.0), (10, 1.0), (10, 95)])
def test_impossible_settings_are_usage_errors(resamples, confidence):
    with pytest.raises(UsageError):
        bootstrap_interval(sample(3), mean, resamples, confidence=confidence)


def test_no_example_is_an_error():
    with pytest.raises(CoraError, match="at least one example"):
        bootstrap_interval(np.empty((0, 1)), mean)


def exact_p(a, b, value):
    n = len(a)
    observed = abs(value(a.sum(axis=0), n) - value(b.sum(axis=0), n))
    hits = 0
    for swaps in itertools.product([0.0, 1.0], repeat=n):
        moved = np.array(swaps)[:, None] * (b - a)
        hits += abs(value((a + moved).sum(axis=0), n) - value((b - moved).sum(axis=0), n)) >= observed - 1e-12
    return hits / 2**n


@pytest.mark.parametrize("value", [mean, ratio])
def test_the_p_value_is_that_of_an_exact_enumeration_of_swaps(value):
    a, b = sample(8), sample(8, seed=11) * [[0.8, 1.0]]
    expected = exact_p(a, b, value)
    assert 0.05 < expected < 0.9
    found = paired_difference(a, b, value, resamples=20_000, seed=0).p_value
    assert found == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / 20_000))


def test_the_p_value_is_that_of_scipys_permutation_test():
    a, b = sample(60, width=1), sample(60, width=1, seed=11) + 0.05
    reference = scipy.stats.permutation_test(
        (a[:, 0], b[:, 0]), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=9999, rng=0
    )
    assert paired_difference(a, b, mean, resamples=9999).p_value == pytest.approx(reference.pvalue, abs=0.02)


def test_a_large_difference_reaches_the_smallest_p_value_that_the_resamples_allow():
    a, b = sample(100), sample(100) - 0.5
    result = paired_difference(a, b, mean, resamples=99)
    assert result.p_value == 1 / 100
    assert result.difference == pytest.approx(0.5)
    assert result.n == 100
    assert result.ci95 == pytest.approx((0.5, 0.5))


def test_equal_systems_have_a_p_value_of_one():
    result = paired_difference(sample(20), sample(20), ratio, resamples=50)
    assert (result.difference, result.ci95, result.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_one_example_decides_nothing():
    # Among so many there are pairs whose exchange, in floating point, gives a smaller difference.
    for a, b in sample(100):
        result = paired_difference(np.array([[a]]), np.array([[b]]), mean, resamples=20)
        assert result.p_value == 1.0
        assert result.ci95 is None


def test_pairing_gives_a_narrower_interval_than_the_two_systems_have():
    a = sample(200, width=1)
    b = a + 0.01 * sample(200, width=1, seed=8)
    low, high = paired_difference(a, b, mean).ci95
    own_low, own_high = bootstrap_interval(a, mean)
    assert high - low < 0.1 * (own_high - own_low)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.3]), st.sampled_from([0.0, 0.1, 0.3])), min_size=1, max_size=6))
def test_exchanging_the_two_systems_mirrors_the_result(pairs):
    both = np.array(pairs)
    one = paired_difference(both[:, :1], both[:, 1:], mean, resamples=40)
    other = paired_difference(both[:, 1:], both[:, :1], mean, resamples=40)
    assert one.p_value == other.p_value
    assert one.difference == -other.difference
    if len(pairs) > 1:
        assert one.ci95 == pytest.approx((-other.ci95[1], -other.ci95[0]), abs=1e-12)


def test_different_numbers_of_examples_are_refused_with_both_shapes():
    with pytest.raises(CoraError, match=r"\(3, 2\) and \(4, 2\)"):
        paired_difference(sample(3), sample(4), mean)
