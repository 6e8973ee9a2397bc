import dataclasses

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from cora_cli.crossed import crossed
from cora_cli.errors import CoraError
from cora_cli.evaluation.metrics.bleu import SacreBleu
from cora_cli.reporting.learning_rate_sweep import rates_of
from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.outcomes import level_at, needed
from cora_cli.reporting.statistics import (
    EXAMPLES,
    SEEDS,
    Difference,
    MethodResults,
    compare,
    group_methods,
    holm,
)
from cora_cli.reporting.summary import best_methods

from .helpers import result


def scores(mean, n=50, seed=0):
    return mean + 0.1 * np.random.default_rng(seed).standard_normal(n)


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


def method(name="fb", seeds=(0, 1, 2), mean=0.5, deviation=0.0, n=50, record=None, **more):
    """A method whose record scores share one draw, with a draw for each seed and record."""
    runs = []
    for seed in seeds:
        own = np.random.default_rng([seed, *name.encode()])
        shift = deviation * own.standard_normal()
        runs.append(result(name, seed, record=record, rouge1=scores(mean, n) + shift + 0.01 * own.standard_normal(n), **more))
    return MethodResults(tuple(runs))


def test_one_seed_keeps_the_recorded_interval_over_records_and_says_so():
    one = method(seeds=(0,)).estimate("rouge1")
    assert (one.kind, one.seeds) == (EXAMPLES, 1)
    assert one.ci95 == (pytest.approx(one.value - 0.1), pytest.approx(one.value + 0.2))


def test_the_interval_of_several_seeds_includes_records_and_seeds():
    records_only = method(seeds=(0, 1, 2)).estimate("rouge1")
    assert (records_only.kind, records_only.seeds, records_only.n) == (SEEDS, 3, 50)
    over_records = 2.01 * np.std(scores(0.5), ddof=1) / np.sqrt(50)
    assert records_only.half_width == pytest.approx(over_records, rel=0.1)
    assert method(seeds=(0, 1, 2), deviation=0.1).estimate("rouge1").half_width > 2 * over_records


def test_two_seeds_that_agree_by_chance_have_no_interval_of_zero():
    # The t-interval over the two values printed 0.444 ± 0.000.
    x = scores(0.444)
    both = MethodResults((result(rouge1=x), result(seed=1, rouge1=np.random.default_rng(5).permutation(x))))
    estimate = both.estimate("rouge1")
    assert estimate.half_width > 0.015


def test_one_record_has_no_interval():
    both = MethodResults((result(rouge1=[0.2]), result(seed=1, rouge1=[0.3])))
    assert both.estimate("rouge1").ci95 is None
    found = compare(both, MethodResults((result("lora", rouge1=[0.1]), result("lora", 1, rouge1=[0.1]))), "rouge1")
    assert (found.ci95, found.ci90, found.p_value) == (None, None, None)


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


def trained(seed, rate=1e-3, alpha=8, **settings):
    record = {"fingerprint": {"settings": {"seed": seed, "learning_rate": rate, **settings}}, "plan": {"alpha": alpha}}
    return result(seed=seed, rate=rate, record=record)


def test_rows_of_one_label_that_were_trained_otherwise_are_no_seeds_of_one_method():
    assert len(group_methods([trained(0), trained(1), trained(0, 2e-3), trained(2, added_later=False)])) == 2
    for other in (trained(1, alpha=16), trained(0, 2e-3, alpha=16)):
        with pytest.raises(
            CoraError, match=r"have one label, 'fb', but were trained with different alpha, .* give them different labels"
        ):
            group_methods([trained(0), other])
    with pytest.raises(CoraError, match="with different dropout, warmup_ratio"):
        group_methods([trained(0, dropout=0, warmup_ratio=0), trained(1, dropout=0.1, warmup_ratio=0.1)])


def test_with_the_same_seeds_the_differences_of_each_seed_are_compared():
    one, other = method("fb", deviation=0.05), method("lora", deviation=0.05, mean=0.45)
    found = compare(one, other, "rouge1")
    stacked = [np.stack([run.measures["rouge1"].statistics[:, 0] for run in side.results]) for side in (one, other)]
    reference = crossed([stacked[0] - stacked[1]])
    assert (found.paired, found.seeds, found.kind) == (True, (3, 3), SEEDS)
    assert found.difference == pytest.approx(float(reference.difference))
    assert found.p_value == pytest.approx(float(reference.p_value()))
    assert found.ci95 == pytest.approx([float(end) for end in reference.interval(0.95)])


def test_methods_of_other_seeds_are_compared_with_a_seed_variance_for_each():
    found = compare(method("fb", (0, 1, 2)), method("lora", (3, 4, 5, 6)), "rouge1")
    assert (found.paired, found.seeds) == (False, (3, 4))


def test_seeds_that_only_one_side_has_are_left_out_where_enough_are_shared():
    found = compare(method("fb", (0, 1, 2)), method("lora", (0, 1, 2, 3)), "rouge1")
    assert (found.paired, found.seeds) == (True, (3, 3))


def test_a_base_model_has_no_seeds_and_is_compared_with_every_seed():
    base = result("base", rouge1=scores(0.3))
    base = MethodResults((dataclasses.replace(base, row=dataclasses.replace(base.row, mode="base", learning_rate=None)),))
    found = compare(method("fb"), base, "rouge1")
    assert (found.paired, found.seeds, found.kind) == (True, (3, None), SEEDS)
    assert found.p_value < 1e-3


def test_a_single_seed_has_an_interval_over_records_and_no_p_value():
    found = compare(method("fb", (0,)), method("lora", (0,)), "rouge1")
    assert (found.kind, found.p_value) == (EXAMPLES, None)
    assert found.ci95 is not None


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


def swept(*methods):
    """Every method at three learning rates, the middle one of which was chosen."""
    other = [
        MethodResults(tuple(dataclasses.replace(r, row=dataclasses.replace(r.row, learning_rate=rate)) for r in one.results))
        for one in methods
        for rate in (1e-9, 9.0)
    ]
    return [*methods, *other]


def test_the_best_is_supported_only_where_it_is_better_than_every_other():
    low, high, near = method("low", mean=0.2), method("high", mean=0.8), method("near", mean=0.799)
    best = best_methods([low, high], ["rouge1"], rates_of(swept(low, high)))["rouge1"]
    assert (best.place, best.supported) == (1, True)
    assert best.p_holm < 0.001
    assert not best_methods([low, high, near], ["rouge1"], rates_of(swept(low, high, near)))["rouge1"].supported
    assert not best_methods([low, high], ["rouge1"])["rouge1"].supported  # one rate each was no sweep


def test_a_best_method_whose_seeds_disagree_is_not_supported():
    high, low = method("high", mean=0.6, deviation=0.3), method("low", mean=0.4)
    assert not best_methods([high, low], ["rouge1"], rates_of(swept(high, low)))["rouge1"].supported


def test_of_losses_the_least_is_the_best():
    methods = [
        MethodResults((result(name, **{LOSS: [[loss * 2, 2], [loss * 3, 3]]}),)) for name, loss in (("a", 2.0), ("b", 1.0))
    ]
    assert best_methods(methods, [LOSS])[LOSS].place == 1


def test_a_method_alone_is_not_the_best_of_anything():
    assert best_methods([MethodResults((result(rouge1=[0.1, 0.2]),))], ["rouge1"]) == {}


def test_seeds_and_records_that_all_agree_have_no_interval() -> None:
    (one,) = group_methods([result(seed=seed, rouge1=[1.0, 1.0, 1.0]) for seed in range(3)])
    (other,) = group_methods([result("other", seed=seed, rouge1=[0.1, 0.1, 0.1]) for seed in range(3)])
    assert (one.estimate("rouge1").value, one.estimate("rouge1").ci95) == (1.0, None)
    assert (compare(one, other, "rouge1").ci95, compare(one, other, "rouge1").p_value) == (None, None)


def test_an_interval_is_computed_once_however_often_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    monkeypatch.setattr("cora_cli.reporting.statistics.crossed", lambda sides: computed.append(len(sides)) or crossed(sides))
    (method,) = group_methods([result(seed=seed, rouge1=[0.1, 0.4, 0.2, 0.9 - seed / 10]) for seed in range(3)])
    assert method.estimate("rouge1") == method.estimate("rouge1")
    assert computed == [1]


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("fb n=2", "fb n=2 r=4"),
        ("fb gradient_accumulation=2", "fb gradient_accumulation=2 r=4 n=2"),
        ("CoRA (r=4, n=2)", "CoRA (r=4, n=2)"),
        ("fb n=25", "fb n=25 r=4 n=2"),
    ],
)
def test_a_name_has_the_rank_and_the_number_of_models_that_its_label_does_not_state(label, name):
    one = result(label)
    assert MethodResults((dataclasses.replace(one, row=dataclasses.replace(one.row, rank=4, n_models=2)),)).name == name


@given(st.integers(0, 500), st.integers(2, 6), st.sampled_from([None, 0.3]), st.sampled_from([None, 4]))
@settings(derandomize=True, deadline=None, max_examples=12)
def test_what_would_decide_is_what_the_test_itself_decides_with_that_many(seed, seeds, margin, looks):
    rng = np.random.default_rng(seed)
    d = 0.1 + 0.3 * rng.standard_normal((seeds, 1)) + rng.standard_normal((1, 30)) + 0.3 * rng.standard_normal((seeds, 30))
    model, tests = crossed([d]), 4
    found = Difference(d.mean(), model.p_value(), SEEDS, 30, (seeds, seeds), True, 0, 0, 0, (seeds, seeds), model)

    def decides(more_seeds, more_records):
        larger = model.enlarged((seeds, np.array([seeds + more_seeds])), (30, np.array([30 + more_records])))
        level = level_at(seeds + more_seeds, looks)
        low, high = larger.interval(1 - 2 * level)
        alike = margin is not None and -margin < low[0] and high[0] < margin
        return larger.p_value()[0] * tests < level or alike

    more_seeds, more_records = needed(found, margin, tests, looks)
    if more_seeds is None:
        assert not any(decides(more, 0) for more in range(max(1, 3 - seeds), 51 - seeds))
    else:
        assert decides(more_seeds, 0)
        assert not any(decides(more, 0) for more in range(max(1, 3 - seeds), more_seeds))
    if more_records is not None:
        assert seeds >= 3
        assert decides(0, more_records)
