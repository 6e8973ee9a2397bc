import numpy as np
import pytest
import scipy.stats

from cora_cli.crossed import _BISECTIONS, _TILT, Crossed, crossed, pseudo_values, stacked
from cora_cli.errors import CoraError


def mean(sums, n):
    return sums[..., 0] / n


def ratio(sums, n):
    return sums[..., 0] / sums[..., 1]


def layout(seeds, records, rng, seed=1.0, record=1.0, interaction=1.0):
    return (
        seed * rng.standard_normal((seeds, 1))
        + record * rng.standard_normal((1, records))
        + interaction * rng.standard_normal((seeds, records))
    )


def only(**parts):
    """A comparison whose variance has only the given parts."""
    fields = {"difference": 0.0, "seed_mean_square": 0.0, "record_mean_square": 0.0, "interaction": 0.0, "third": 0.0}
    fields |= {"seed_df": 2.0, "record_df": 39.0, **parts}
    return Crossed(**{name: np.array(value) for name, value in fields.items()})


def test_a_layout_worked_out_by_hand():
    # Rows 1 2 3 / 3 4 8: means 2, 5 and 2, 3, 5.5. MS_seed = 3·(1.5² + 1.5²) = 13.5; MS_record = 2·(1.5² + 0.5² + 2²)/2 = 6.5;
    # residuals ±0.5, ±0.5, ∓1, so that MS_error = 2·(0.25 + 0.25 + 1)/2 = 1.5. Each is divided by S·R = 6.
    found = crossed([np.array([[1.0, 2, 3], [3, 4, 8]])])
    assert found.difference == pytest.approx(3.5)
    assert found.seed_mean_square == pytest.approx(13.5 / 6)
    assert found.record_mean_square == pytest.approx(6.5 / 6)
    assert found.interaction == pytest.approx(1.5 / 6)
    assert found.variance == pytest.approx((13.5 + 6.5 - 1.5) / 6)


def test_the_mean_squares_are_those_of_an_explicit_analysis_of_variance():
    d = layout(4, 23, np.random.default_rng(0))
    s, r = d.shape
    rows, columns, grand = d.mean(axis=1), d.mean(axis=0), d.mean()
    seed = r * sum((row - grand) ** 2 for row in rows) / (s - 1)
    record = s * sum((column - grand) ** 2 for column in columns) / (r - 1)
    residuals = [(d[i, j] - rows[i] - columns[j] + grand) ** 2 for i in range(s) for j in range(r)]
    error = sum(residuals) / ((s - 1) * (r - 1))
    found = crossed([d])
    parts = (found.seed_mean_square, found.record_mean_square, found.interaction)
    assert [float(part) * s * r for part in parts] == pytest.approx([seed, record, error])
    assert float(found.seed_df) == pytest.approx(s - 1)


def test_the_variance_is_never_below_either_mean_square():
    rng = np.random.default_rng(1)
    found = crossed([rng.standard_normal((200, 3, 20))])
    assert (found.variance >= found.record_mean_square).all()
    assert (found.variance >= found.seed_mean_square - found.interaction).all()
    assert (found.seed >= 0).all()


def test_where_seeds_dominate_it_is_the_t_test_over_seeds():
    same = {"seed_mean_square": 1.0, "record_mean_square": 1e-12, "interaction": 0.0, "third": 0.0, "seed_df": 2.0}
    found = only(difference=[1.0, 3.0, 10.0, 50.0], record_df=[39.0] * 4, **{name: [value] * 4 for name, value in same.items()})
    assert found.p_value() == pytest.approx(2 * scipy.stats.t.sf([1, 3, 10, 50], 2), rel=1e-4)
    low, high = found.interval(0.95)
    half = scipy.stats.t.ppf(0.975, 2)
    assert (low, high) == (pytest.approx(found.difference - half, rel=1e-4), pytest.approx(found.difference + half, rel=1e-4))


def test_where_records_dominate_it_is_the_t_test_over_records():
    found = only(difference=3.0, record_mean_square=1.0)
    assert float(found.p_value()) == pytest.approx(2 * scipy.stats.t.sf(3, 39))
    assert float(found.interval(0.9)[0]) == pytest.approx(3 - scipy.stats.t.ppf(0.95, 39))


def test_two_sides_with_their_own_seeds_add_their_seed_parts_as_welch_does():
    rng = np.random.default_rng(2)
    one, other = layout(3, 500, rng, record=0), layout(5, 500, rng, record=0)
    found = crossed([one, other])
    seeds = [side.mean(axis=1) for side in (one, other)]
    assert float(found.seed_mean_square) == pytest.approx(sum(side.var(ddof=1) / len(side) for side in seeds))
    welch = scipy.stats.ttest_ind(*seeds, equal_var=False)
    assert float(found.seed_df) == pytest.approx(welch.df)
    assert float(found.difference) == pytest.approx(seeds[0].mean() - seeds[1].mean())


def test_skewed_differences_at_twenty_records_are_covered_as_often_as_claimed():
    # The percentile bootstrap covered 90 % here, and the randomisation test rejected 7.7 %.
    rng = np.random.default_rng(3)
    found = crossed([rng.gamma(2.0, 1.0, (4000, 1, 20)) - 2.0])
    assert 0.935 < found.covered(0.0, 0.95).mean() < 0.97
    assert (found.p_value() < 0.05).mean() < 0.06


def test_the_interval_includes_what_covered_says():
    found = crossed([layout(3, 40, np.random.default_rng(4))])
    low, high = found.interval(0.95)
    assert found.covered(low + 1e-6, 0.95)
    assert not found.covered(low - 1e-6, 0.95)
    assert found.covered(high - 1e-6, 0.95)
    assert not found.covered(high + 1e-6, 0.95)


def test_one_record_is_refused():
    with pytest.raises(CoraError, match="at least two"):
        crossed([np.zeros((3, 1))])


def test_the_pseudo_values_of_a_mean_are_the_records_own_numbers():
    x = np.random.default_rng(5).standard_normal((7, 1))
    assert pseudo_values(x, mean) == pytest.approx(x[:, 0])


def test_the_pseudo_values_of_a_ratio_are_the_jackknifes_around_its_value():
    x = np.random.default_rng(6).uniform(1, 2, (9, 2))
    values = pseudo_values(x, ratio)
    assert values.mean() == pytest.approx(x[:, 0].sum() / x[:, 1].sum())
    without = np.array([np.delete(x, place, axis=0).sum(axis=0) for place in range(9)])
    jackknife = 9 * values.mean() - 8 * without[:, 0] / without[:, 1]
    assert values - values.mean() == pytest.approx(jackknife - jackknife.mean())


def several():
    """Comparisons of few and many seeds and records, with skewed records, without a seed part, and with hardly anything else."""
    rng = np.random.default_rng(7)
    sizes = [(1, 5), (2, 3), (3, 40), (6, 20)]
    normal = [crossed([layout(seeds, records, rng)]) for seeds, records in sizes]
    skewed = [crossed([1e-3 * rng.exponential(size=size) ** 3 + 7]) for size in sizes]
    by_seed = [crossed([layout(3, 20, rng, 1.0, 1e-6, 1e-6)]), crossed([layout(3, 20, rng, 1e-6, 1.0, 1e-6)])]
    return [*normal, *skewed, *by_seed]


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.999])
def test_an_end_is_that_of_a_plain_bisection_to_the_last_digit(confidence):
    for found in several():
        scale = np.sqrt(found.variance)
        reach = (1e3 if found.seed_df > 0 else 30.0) * scale
        ends = []
        for share in ((1 + confidence) / 2, (1 - confidence) / 2):
            low, high = found.difference - reach, found.difference + reach
            for _ in range(_BISECTIONS):
                middle = (low + high) / 2
                low, high = (middle, high) if found._below(middle, _TILT) > share else (low, middle)
            ends.append((low + high) / 2)
        assert [float(end) for end in found.interval(confidence)] == [float(end) for end in ends]


def test_intervals_computed_together_are_those_of_each_alone():
    together = stacked(several()).interval(0.95)
    assert [list(map(float, one.interval(0.95))) for one in several()] == np.stack(together, axis=-1).tolist()


def test_records_that_occur_again_and_again_are_what_is_projected_for_more_of_them():
    d = 0.35 + layout(4, 60, np.random.default_rng(5), seed=0.2, interaction=0.02)  # that of repeated records does not shrink
    now, then = crossed([d]), crossed([np.tile(d, 5)])
    same, larger = (now.enlarged((4, np.array([4])), (60, np.array([count]))) for count in (60, 300))
    assert same.p_value() == pytest.approx(now.p_value())
    assert larger.p_value() == pytest.approx(then.p_value(), rel=0.05)
    assert larger.p_value() < 0.8 * now.p_value()
    for confidence in (0.5, 0.9):
        wide = float(then.interval(confidence)[1])
        assert larger.covered(wide * 0.97, confidence)
        assert not larger.covered(wide * 1.03, confidence)


def test_more_seeds_reduce_the_part_of_the_seeds_and_have_more_degrees_of_freedom():
    found = crossed([1.0 + layout(3, 40, np.random.default_rng(6))])
    more = found.enlarged((3, np.array([6, 30])), (40, np.array([40, 40])))
    assert more.seed == pytest.approx(found.seed * np.array([0.5, 0.1]))
    assert more.record == pytest.approx(found.record * np.ones(2))
    assert more.seed_df == pytest.approx([5, 29])
