import tracemalloc

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from cora_cli import intervals
from cora_cli.errors import CoraError, UsageError
from cora_cli.intervals import bootstrap_interval, bootstrap_sums, has_ratio, paired_difference, ratio_interval


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
    monkeypatch.setattr(intervals, "BLOCK_BYTES", 3 * 8 * 50)
    np.testing.assert_allclose(bootstrap_sums(statistics, 64, seed=1), whole, rtol=1e-13)


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


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, 100.0])
def test_examples_that_all_agree_have_no_interval(value):
    assert bootstrap_interval(np.full((7, 1), value), mean, resamples=20) is None
    # Nor have they where only the tokens differ by which a record counts.
    tokens = np.arange(1.0, 8.0)
    assert bootstrap_interval(np.stack([value * tokens, tokens], axis=1), ratio, resamples=20) is None


def test_a_single_example_has_no_interval():
    assert bootstrap_interval(np.full((1, 1), 0.1), mean, resamples=20) is None
    assert paired_difference(np.ones((1, 1)), np.zeros((1, 1)), mean).ci95 is None


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


def test_many_normal_examples_give_the_paired_t_test():
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((2, 2000, 1))
    b += 0.05
    reference = scipy.stats.ttest_rel(a[:, 0], b[:, 0])
    found = paired_difference(a, b, mean)
    assert found.difference == pytest.approx((a - b).mean())
    assert found.p_value == pytest.approx(reference.pvalue, abs=0.01)
    interval = reference.confidence_interval(0.95)
    assert found.ci95 == pytest.approx((interval.low, interval.high), abs=0.002)


def test_a_difference_that_is_the_same_in_every_example_is_that_of_the_sign_test():
    a = sample(100, width=1)
    result = paired_difference(a, a - 0.5, mean)
    assert result.p_value == 0.5**99
    assert result.difference == pytest.approx(0.5)
    assert result.n == 100
    assert result.ci95 is None


def test_equal_systems_have_a_p_value_of_one():
    result = paired_difference(sample(20), sample(20), ratio)
    assert (result.difference, result.ci95, result.p_value) == (0.0, None, 1.0)


def test_one_example_decides_nothing():
    result = paired_difference(np.array([[0.1]]), np.array([[0.7]]), mean)
    assert result.p_value == 1.0
    assert result.ci95 is None


@pytest.mark.parametrize("n", [20, pytest.param(40, marks=pytest.mark.slow)])
def test_intervals_of_few_skewed_pairs_cover_the_true_difference(n):
    # The percentile bootstrap covered 0.90 at n = 20.
    rng = np.random.default_rng(n)
    draws = [paired_difference(rng.gamma(2.0, 1.0, (n, 1)), np.full((n, 1), 2.0), mean) for _ in range(600)]
    covered = sum(found.ci95[0] <= 0 <= found.ci95[1] for found in draws) / len(draws)
    assert 0.925 < covered < 0.98
    assert sum(found.p_value < 0.05 for found in draws) / len(draws) < 0.065


@pytest.mark.parametrize("shape", [1.0, *(pytest.param(shape, marks=pytest.mark.slow) for shape in (2.0, 6.0))])
def test_the_paired_test_of_twenty_skewed_differences_keeps_its_level(shape):
    """Gamma differences of skewness 2, 1.4 and 0.8: the percentile bootstrap rejects 7 to 10 % of true hypotheses."""
    count = 1000
    drawn = np.random.default_rng([20, int(shape)]).gamma(shape, 1.0, (count, 20, 1))
    rejected = sum(paired_difference(one, np.full((20, 1), shape), mean).p_value < 0.05 for one in drawn) / count
    assert rejected < 0.05 + 2 * (0.05 * 0.95 / count) ** 0.5


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
    one = paired_difference(both[:, :1], both[:, 1:], mean)
    other = paired_difference(both[:, 1:], both[:, :1], mean)
    assert one.p_value == pytest.approx(other.p_value)
    assert one.difference == -other.difference
    assert (one.ci95 is None) == (other.ci95 is None)
    if one.ci95:
        assert one.ci95 == pytest.approx((-other.ci95[1], -other.ci95[0]), abs=1e-9)


def test_different_numbers_of_examples_are_refused_with_both_shapes():
    with pytest.raises(CoraError, match=r"\(3, 2\) and \(4, 2\)"):
        paired_difference(sample(3), sample(4), mean)


@pytest.mark.parametrize("true", [0.0, 0.4, 1.2])
def test_the_interval_of_a_ratio_holds_the_true_one_about_as_often_as_it_says(true):
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        below = 1 + generator.standard_normal(20)
        found = ratio_interval(true * below + 0.5 * generator.standard_normal(20), below)
        hits += found is None or found[0] <= true <= found[1]
    assert 0.93 <= hits / 1000 <= 0.97


def test_a_ratio_to_nothing_and_one_that_is_the_same_in_every_example_have_no_interval():
    values = np.random.default_rng(0).standard_normal(20) + 2
    assert ratio_interval(values, values) is None
    assert ratio_interval(0 * values, values) is None
    assert has_ratio(values)
    assert not has_ratio(values - values.mean())
    assert ratio_interval(values, values - values.mean()) is None
    assert ratio_interval(values[:1], values[:1]) is None
