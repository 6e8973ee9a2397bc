import numpy as np
import pytest
import sacrebleu
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from cora_cli.errors import CoraError
from cora_cli.evaluation.metrics.bleu import SacreBleu
from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.statistics import (
    EXAMPLES,
    SEEDS,
    MethodResults,
    best_methods,
    compare,
    group_methods,
    holm,
    resamples_for,
    t_interval,
)

from .helpers import result


def scores(mean, n=50, seed=0):
    return mean + 0.1 * np.random.default_rng(seed).standard_normal(n)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_the_interval_over_seeds_is_scipys(count):
    values = list(np.random.default_rng(count).standard_normal(count))
    mean, half = t_interval(values)
    low, high = scipy.stats.t.interval(0.95, count - 1, loc=np.mean(values), scale=scipy.stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_two_seeds_give_the_interval_computed_by_hand():
    # t(0.975, 1) = 12.7062; the values differ by 2, so that s / √2 = 1.
    assert t_interval([1.0, 3.0]) == pytest.approx((2.0, 12.7062), abs=1e-4)


def test_holms_p_values_are_those_computed_by_hand():
    # 4 × 0.01; 3 × 0.02 = 0.06; 2 × 0.03 = 0.06; 1 × 0.04 may not fall below its predecessors.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0.0001, 1), min_size=1, max_size=8))
@settings(derandomize=True, deadline=None, max_examples=50)
def test_holm_lies_between_no_correction_and_bonferronis_and_keeps_the_order(p_values):
    adjusted = holm(p_values)
    assert all(p <= a <= min(1.0, len(p_values) * p) + 1e-12 for p, a in zip(p_values, adjusted, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()


def test_one_seed_keeps_the_recorded_bootstrap_interval_and_several_get_a_t_interval():
    one = MethodResults((result(rouge1=[0.2, 0.4]),)).estimate("rouge1")
    assert (one.kind, one.low, one.high, one.seeds) == (EXAMPLES, pytest.approx(0.2), pytest.approx(0.5), 1)
    several = MethodResults((result(rouge1=[0.2, 0.4]), result(seed=1, rouge1=[0.4, 0.6]))).estimate("rouge1")
    assert (several.kind, several.value, several.seeds, several.n) == (SEEDS, pytest.approx(0.4), 2, 2)
    assert several.half_width == pytest.approx(12.7062 * 0.1, rel=1e-4)


def test_runs_that_cannot_train_have_no_spread_over_seeds():
    frozen = {"is_base_model": True}
    both = MethodResults((result(record=frozen, rouge1=[0.2, 0.4]), result(seed=1, record=frozen, rouge1=[0.2, 0.4])))
    assert both.estimate("rouge1").kind == EXAMPLES


def test_a_measure_that_no_seed_has_gives_no_estimate():
    assert MethodResults((result(),)).estimate("rouge1") is None


def test_rows_that_differ_only_by_seed_are_one_method():
    methods = group_methods([result(seed=1), result(seed=0), result(rate=2e-3), result("lora")])
    assert [(m.first.row.label, m.first.row.learning_rate, m.seeds) for m in methods] == [
        ("fb", 1e-3, (0, 1)),
        ("fb", 2e-3, (0,)),
        ("lora", 1e-3, (0,)),
    ]


def test_two_rows_of_one_method_and_seed_are_refused_by_name():
    with pytest.raises(CoraError, match=r"fb-0\.001-0 and fb-0\.001-0 are the same method with the same seed 0"):
        group_methods([result(), result()])


def test_the_paired_test_is_that_of_the_means_over_seeds():
    one = MethodResults((result(rouge1=scores(0.5, seed=1)), result(seed=1, rouge1=scores(0.5, seed=2))))
    other = MethodResults((result(rouge1=scores(0.46, seed=3)),))
    found = compare(one, other, "rouge1")
    difference = (scores(0.5, seed=1) + scores(0.5, seed=2)) / 2 - scores(0.46, seed=3)
    reference = scipy.stats.permutation_test((difference,), np.mean, permutation_type="samples", n_resamples=9999, rng=0)
    assert found.difference == pytest.approx(difference.mean())
    assert found.p_value == pytest.approx(reference.pvalue, abs=0.015)


def test_the_held_out_loss_is_compared_as_a_ratio_of_sums():
    one = MethodResults((result(**{LOSS: [[2.0, 2], [9.0, 3]]}),))
    other = MethodResults((result(**{LOSS: [[1.0, 2], [3.0, 3]]}),))
    assert compare(one, other, LOSS).difference == pytest.approx(11 / 5 - 4 / 5)


def test_corpus_bleu_is_the_mean_over_seeds_of_each_seeds_own_corpus_value():
    references = ["the river runs past three old towns", "one short answer is enough for this question"] * 3
    answers = [
        ["the river runs past three towns", "one short answer for this question"] * 3,
        ["a river runs past three old towns", "no answer is enough"] * 3,
        ["the river runs", "one short answer is enough for this"] * 3,
    ]
    bleu = SacreBleu()
    rows = [bleu.statistics(texts, references) for texts in answers]
    values = [sacrebleu.corpus_bleu(texts, [references]).score for texts in answers]
    one = MethodResults((result(sacrebleu=rows[0]), result(seed=1, sacrebleu=rows[1])))
    found = compare(one, MethodResults((result(sacrebleu=rows[2]),)), "sacrebleu")
    assert found.difference == pytest.approx((values[0] + values[1]) / 2 - values[2])


def test_the_best_is_supported_only_where_it_differs_from_every_other():
    low, high, near = (
        MethodResults((result(name, rouge1=scores(mean, seed=seed)),))
        for name, mean, seed in (("low", 0.2, 1), ("high", 0.8, 2), ("near", 0.79, 3))
    )
    assert best_methods([low, high], ["rouge1"]) == {"rouge1": (1, 1 / 5000, True)}
    place, p_holm, _ = best_methods([low, high, near], ["rouge1"])["rouge1"]
    assert place == 1
    assert p_holm > 0.05


def test_tests_of_all_measures_are_corrected_together():
    methods = [
        MethodResults((result(str(place), rouge1=scores(mean, seed=place), rougeL=scores(mean, seed=place + 10)),))
        for place, mean in enumerate((0.2, 0.8))
    ]
    found = best_methods(methods, ["rouge1", "rougeL"])
    assert [p_holm for _, p_holm, _ in found.values()] == [2 / 5000, 2 / 5000]


def test_a_method_that_one_seed_puts_behind_is_not_the_supported_best():
    high = MethodResults(
        tuple(result(f"high{seed}", seed=seed, rouge1=scores(mean, seed=seed)) for seed, mean in ((0, 0.95), (1, 0.3)))
    )
    low = MethodResults(tuple(result(f"low{seed}", seed=seed, rouge1=scores(0.4, seed=5 + seed)) for seed in (0, 1)))
    place, p_holm, seeds_agree = best_methods([high, low], ["rouge1"])["rouge1"]
    assert (place, p_holm < 0.05, seeds_agree) == (0, True, False)


def test_of_losses_the_least_is_the_best():
    methods = [
        MethodResults((result(name, **{LOSS: [[loss * 2, 2], [loss * 3, 3]]}),)) for name, loss in (("a", 2.0), ("b", 1.0))
    ]
    assert best_methods(methods, [LOSS])[LOSS][0] == 1


def test_a_method_alone_is_not_the_best_of_anything():
    assert best_methods([MethodResults((result(rouge1=[0.1, 0.2]),))], ["rouge1"]) == {}


def test_the_smallest_p_value_survives_the_correction_of_any_number_of_tests():
    assert all(tests / (1 + resamples_for(tests)) < 0.05 for tests in (1, 100, 250, 1000, 5000))
