"""Rank correlations between the captures of bases and losses: the interval, and when there is no conclusion."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from cora_cli.inspection.prediction import Point, Prediction, spearman


def prediction(captures: list[float], losses: list[float]) -> Prediction:
    points = tuple(Point(f"b{n}", one, other, 1) for n, (one, other) in enumerate(zip(captures, losses, strict=True)))
    return Prediction("data, fb r=4", points, *(spearman(captures, losses) or (None, None)))


@pytest.mark.parametrize(
    ("rates", "alike"),
    [
        ([(1e-3,), (1e-3,)], True),
        ([(1e-3,), (1e-2,)], False),
        ([(1e-3, 1e-2), (1e-2, 1e-1)], True),
        ([(1e-3, 1e-2), (1e-2,)], False),
    ],
)
def test_bases_whose_learning_rates_were_not_swept_alike_are_correlated_with_a_word(rates, alike):
    numbers = [1.0, 2.0, 3.0, 4.0]
    points = tuple(Point(f"b{n}", n, 5 - n, 1, rates[n > 2][0], rates[n > 2]) for n in numbers)
    found = Prediction("data, fb r=4", points, *(spearman(numbers, [-n for n in numbers]) or (None, None)))
    assert ("not swept alike" in found.sentence()) == (not alike)


@pytest.mark.parametrize("n", [4, 7, 30])
def test_rho_is_scipys_and_lies_in_its_interval(n):
    generator = np.random.default_rng(n)
    one, other = generator.integers(0, n, (2, n)).astype(float)
    one[0], other[-1] = n + 1, n + 2
    found = spearman(list(one), list(other))
    assert found is not None
    rho, (low, high) = found
    assert rho == pytest.approx(spearmanr(one, other).statistic)
    assert -1 <= low <= rho <= high <= 1


def test_the_interval_holds_the_true_correlation_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    pearson, n, hits = 0.5, 12, 0
    true = 6 / np.pi * np.arcsin(pearson / 2)
    for _ in range(1000):
        one = generator.standard_normal(n)
        other = pearson * one + np.sqrt(1 - pearson**2) * generator.standard_normal(n)
        found = spearman(list(one), list(other))
        assert found is not None
        hits += found[1][0] <= true <= found[1][1]
    assert 0.93 <= hits / 1000 <= 0.99


def test_a_perfect_order_proves_more_the_more_bases_there_are():
    ends = []
    for n in (4, 5, 9, 20):
        found = spearman(list(range(n)), list(range(n, 0, -1)))
        assert found is not None
        rho, (low, high) = found
        assert (rho, low) == (pytest.approx(-1), pytest.approx(-1))
        ends.append(high)
    assert ends == sorted(ends, reverse=True)
    assert ends[0] > 0 > ends[2], "four bases in order prove nothing, nine do"


@pytest.mark.parametrize(
    ("captures", "losses"),
    [([0.1, 0.2, 0.3], [3, 2, 1]), ([0.1] * 5, [5, 4, 3, 2, 1]), ([0.1, 0.2, 0.3, 0.4], [1] * 4), ([], [])],
)
def test_fewer_than_four_bases_or_no_spread_say_nothing(captures, losses):
    found = prediction(captures, losses)
    assert found.rho is None
    assert "No conclusion" in found.sentence()


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (range(9, 0, -1), "Capture predicts the held-out loss"),
        (range(9), "Capture is misleading"),
        ([4, 1, 7, 2, 9, 3, 8, 5, 6], "Capture is not shown to predict the held-out loss"),
    ],
)
def test_the_sentence_follows_from_the_interval(losses, said):
    assert said in prediction([n / 10 for n in range(9)], [float(loss) for loss in losses]).sentence()
