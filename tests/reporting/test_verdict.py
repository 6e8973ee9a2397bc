import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from cora_cli.reporting.collect import collect
from cora_cli.reporting.comparison import BASE, BASE_B, LORA_RANK, LORA_SIZE, RANDOM_B
from cora_cli.reporting.learning_rate_sweep import AT_EDGE, UNSWEPT, rates_of
from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.outcomes import BETTER, EQUIVALENT, FEW_SEEDS, UNDECIDED, WORSE
from cora_cli.reporting.report_rows import read_plan
from cora_cli.reporting.statistics import group_methods
from cora_cli.reporting.summary import summarise
from cora_cli.reporting.tables import verdict_table
from cora_cli.reporting.verdict import judge
from tests.reporting.helpers import Made, make_grid, result

TOKENS = np.random.default_rng(9).integers(20, 80, 48).astype(float)
RECORDS = 0.04 * np.random.default_rng(10).standard_normal(48)
FB = {"b_init": "basis"}
RANDOM = {"b_init": "orthonormal"}
GRADIENT = {"b_init": "gradient"}


def runs(label, plan, loss, deviation=0.0, seeds=range(5), rates=(3e-4, 1e-3, 3e-3), mode="fb", stream=0, **row):
    """A method whose rate of 1e-3 is better than its others: records in common, and a draw for each seed."""
    made = []
    for rate in rates:
        for seed in seeds:
            own = np.random.default_rng([stream, seed, *label.encode()])
            nats = loss + (rate not in (1e-3, None)) + deviation * own.standard_normal() + 0.01 * own.standard_normal(48)
            one = result(label, seed, rate, {"plan": plan}, **{LOSS: np.stack([TOKENS * (nats + RECORDS), TOKENS], axis=1)})
            made.append(dataclasses.replace(one, row=dataclasses.replace(one.row, mode=mode, **row)))
    return made


def base(loss=1.0):
    (one,) = runs("base", {}, loss, seeds=(0,), rates=(None,), mode="base")
    return [dataclasses.replace(one, row=dataclasses.replace(one.row, run=None, learning_rate=None))]


def lora(loss, **more):
    return runs("lora", {"b_init": "zeros"}, loss, mode="lora", n_models=None, **more)


def random(loss, **more):
    return runs("random", RANDOM, loss, n_models=None, **more)


def verdict_of(*groups, margin=None):
    swept = group_methods([one for group in groups for one in group])
    rates = [method.first.row.learning_rate for method in swept]
    chosen = [method for method, rate in zip(swept, rates, strict=True) if rate in (None, 1e-3)]
    return judge(chosen, [LOSS], rates_of(swept), margin)


def outcomes(verdict):
    return {(c.one.first.row.label, c.role, c.control): c.tests[0].outcome for c in verdict.comparisons}


def test_a_b_that_helps_is_better_than_each_control():
    verdict = verdict_of(base(), runs("fb", FB, 0.5), random(0.6), lora(0.62))
    found = outcomes(verdict)
    assert found["fb", RANDOM_B, False] == found["fb", LORA_RANK, False] == found["fb", BASE, False] == BETTER
    assert verdict.headline == (
        "Compared with a random orthonormal B, the informed B is better in 1 (held-out loss) test. "
        "Compared with LoRA at equal rank, the informed B is better in 1 (held-out loss) test."
    )


def test_the_random_controls_comparison_with_lora_stands_in_the_next_line():
    verdict = verdict_of(base(), runs("fb", FB, 0.5), random(0.6), lora(0.62))
    rows = [(c.one.first.row.label, c.other.first.row.label, c.role, c.control) for c in verdict.comparisons]
    place = rows.index(("fb", "lora", LORA_RANK, False))
    assert rows[place + 1] == ("random", "lora", LORA_RANK, True)


def test_the_information_in_b_gets_no_credit_where_a_random_b_beats_lora_too():
    verdict = verdict_of(base(), runs("fb", FB, 0.5), random(0.5), lora(0.6))
    assert outcomes(verdict)["random", LORA_RANK, True] == BETTER
    assert "better in 1 (held-out loss) test, but so is a random B: no credit to the information in B." in verdict.headline


def test_without_a_random_control_that_it_beats_the_information_gets_no_credit():
    verdict = verdict_of(base(), runs("fb", FB, 0.5), random(0.55, deviation=0.1), lora(0.6))
    assert outcomes(verdict)["random", LORA_RANK, True] == UNDECIDED
    assert "but it is not shown to be better than a random B: no credit to the information in B" in verdict.headline


def test_at_equal_trained_parameters_too_the_information_gets_credit_only_where_it_beats_a_random_b():
    small = lora(0.6, rank=2)
    without = verdict_of(base(), runs("fb", FB, 0.5), random(0.5), small)
    assert outcomes(without)["fb", LORA_SIZE, False] == outcomes(without)["random", LORA_SIZE, True] == BETTER
    said = "Compared with LoRA at equal trained parameters, the informed B is better in 1 (held-out loss) test"
    assert f"{said}, but so is a random B: no credit to the information in B." in without.headline
    credited = verdict_of(base(), runs("fb", FB, 0.5), random(0.55), small)
    assert f"{said}." in credited.headline


def on(plan, *modules):
    return {**plan, "target_modules": list(modules)}


def test_a_lora_on_other_layers_is_a_control_by_its_parameters_alone_and_is_named():
    ours, others = ("q_proj", "v_proj"), runs("lora", on({"b_init": "zeros"}, "o_proj"), 0.62, mode="lora", n_models=None)
    verdict = verdict_of(base(), runs("fb", on(FB, *ours), 0.5), runs("random", on(RANDOM, *ours), 0.6, n_models=None), others)
    assert {c.role for c in verdict.comparisons if c.other.first.row.label == "lora"} == {
        LORA_SIZE
    }  # although its rank is the same
    where = "on o_proj instead of q_proj and v_proj"
    (sentence,) = (c.sentence() for c in verdict.comparisons if c.role == LORA_SIZE and not c.control)
    assert f"(LoRA at equal trained parameters, {where}): better in held-out loss" in sentence
    assert f"Compared with LoRA at equal trained parameters ({where}), the informed B is better" in verdict.headline
    assert "No conclusion about LoRA at equal rank: there is no finished run of it." in verdict.headline

    same = runs("lora", on({"b_init": "zeros"}, "v_proj", "q_proj"), 0.62, mode="lora", n_models=None, rank=2)
    verdict = verdict_of(
        base(), runs("fb", on(FB, *ours), 0.5), runs("random", on(RANDOM, *ours), 0.6, n_models=None), others, same
    )
    assert f"Compared with LoRA at equal trained parameters (in part {where}), the" in verdict.headline


def test_a_lora_on_other_layers_with_other_parameters_is_no_control():
    few = runs("lora", on({"b_init": "zeros"}, "o_proj"), 0.62, mode="lora", n_models=None)
    few = [dataclasses.replace(one, trained=9) for one in few]
    verdict = verdict_of(base(), runs("fb", on(FB, "q_proj"), 0.5), few)
    assert [c.role for c in verdict.comparisons] == [BASE]


def test_a_random_b_in_other_layers_is_no_control_of_an_informed_one():
    verdict = verdict_of(base(), runs("fb", on(FB, "q_proj"), 0.5), runs("random", on(RANDOM, "k_proj"), 0.6, n_models=None))
    assert [c.role for c in verdict.comparisons] == [BASE]


def test_an_informed_b_without_a_random_control_of_its_form_concludes_nothing_about_the_information():
    verdict = verdict_of(base(), runs("fb", FB, 0.5), random(0.6), runs("tb", FB, 0.5, mode="tb"), lora(0.62))
    assert (
        "No conclusion about the information in B of tb r=4 n=1: there is no finished run of the random control. "
        "Train it with --mode tb --rank 4 --b-init orthonormal." in verdict.headline
    )
    marked = {(c.one.first.row.label, c.role): c.uncontrolled for c in verdict.comparisons if not c.control}
    assert {key for key, uncontrolled in marked.items() if uncontrolled} == {("tb", LORA_RANK)}
    (sentence,) = (c.sentence() for c in verdict.comparisons if c.uncontrolled)
    assert "without a random control of this form, no conclusion about the information in B" in sentence


def test_without_any_random_control_there_is_no_conclusion_either():
    verdict = verdict_of(base(), runs("fb", FB, 0.5), lora(0.62), lora(0.62, rank=2))
    assert verdict.headline.startswith(
        "No conclusion about the information in B: there is no finished run of the random control."
    )
    assert [c.role for c in verdict.comparisons if c.uncontrolled] == [LORA_RANK, LORA_SIZE]


def test_a_comparison_of_methods_with_unequal_seeds_says_how_many_it_uses():
    def sentence(*seeds):
        one, other = seeds
        return verdict_of(base(), runs("fb", FB, 0.5, seeds=one), random(0.6, seeds=other)).comparisons[0].sentence()

    assert "seeds" not in sentence(range(5), range(5))
    assert "(over the 3 seeds that both have, of 5 and 3)" in sentence(range(5), range(3))
    assert "(over the 3 seeds that both have, of 5 and 5)" in sentence(range(5), range(2, 7))
    assert "(5 and 4 seeds, not paired: fewer than 3 in common)" in sentence(range(5), range(3, 7))


def test_a_b_that_hurts_is_called_worse():
    verdict = verdict_of(base(), runs("fb", FB, 0.6), random(0.5))
    assert outcomes(verdict)["fb", RANDOM_B, False] == WORSE
    assert "the informed B is worse in 1 (held-out loss) test" in verdict.headline


@pytest.mark.parametrize("seeds", [1, 2])
def test_with_one_or_two_seeds_nothing_is_decided_however_large_the_difference(seeds):
    # 48 records and a null effect: over seeds that differ by 0.008 nats, tests over records said better or worse in 14 and 6 %.
    for stream in range(20):
        null = verdict_of(
            base(),
            runs("fb", FB, 0.5, 0.008, range(seeds), stream=stream),
            random(0.5, deviation=0.008, seeds=range(seeds), stream=stream),
        )
        assert outcomes(null)["fb", RANDOM_B, False] == UNDECIDED
    clear = verdict_of(base(), runs("fb", FB, 0.3, seeds=range(seeds)), random(0.5, seeds=range(seeds)))
    (test,) = clear.comparisons[0].tests
    assert (test.outcome, test.obstacle) == (UNDECIDED, FEW_SEEDS)
    assert "A decision needs at least 3 seeds per method." in clear.headline


def test_five_seeds_of_a_null_effect_that_differ_are_rarely_called_different():
    said = [
        outcomes(
            verdict_of(base(), runs("fb", FB, 0.5, 0.016, stream=stream), random(0.5, deviation=0.016, stream=100 + stream))
        )["fb", RANDOM_B, False]
        for stream in range(60)
    ]
    assert sum(word in (BETTER, WORSE) for word in said) <= 6


def test_lora_on_weights_of_4_bits_is_a_method_of_its_own_and_no_control():
    quantized = [
        dataclasses.replace(one, record={**one.record, "fingerprint": {"settings": {"load_in_4bit": True}}})
        for one in runs("qlora", {"b_init": "zeros"}, 0.9, mode="lora", n_models=None)
    ]
    verdict = verdict_of(base(), runs("fb", FB, 0.6), random(0.6), lora(0.6), quantized)
    assert not any(comparison.other.name.startswith("qlora") for comparison in verdict.comparisons)
    assert any(c.one.name.startswith("qlora") and c.other.name.startswith("lora") for c in verdict.comparisons)


def test_methods_whose_rates_were_not_swept_alike_stay_undecided_and_the_reason_is_said():
    for verdict in (
        verdict_of(base(), runs("fb", FB, 0.5, rates=(1e-3,)), random(0.6, rates=(1e-3,))),
        verdict_of(base(), runs("fb", FB, 0.5), random(0.6, rates=(1e-3,))),
    ):
        (test,) = verdict.comparisons[0].tests
        assert (test.outcome, test.obstacle) == (UNDECIDED, UNSWEPT)
        assert test.p_holm < 0.001
        assert "A decision needs learning rates that were swept alike." in verdict.headline
        assert "learning rates not swept alike" in verdict.comparisons[0].sentence()


@pytest.mark.parametrize("edges", [{"fb"}, {"random"}, {"fb", "random"}])
def test_a_best_rate_at_the_edge_of_its_sweep_decides_nothing_and_the_reason_is_said(edges):
    rates = {label: (1e-3, 3e-3, 1e-2) if label in edges else (3e-4, 1e-3, 3e-3) for label in ("fb", "random")}
    for other in (0.6, 0.5):  # better, and equivalent, with both rates inside
        verdict = verdict_of(base(), runs("fb", FB, 0.5, rates=rates["fb"]), random(other, rates=rates["random"]))
        (test,) = verdict.comparisons[0].tests
        assert (test.outcome, test.more_seeds, test.more_records) == (UNDECIDED, None, None)
        for name in edges:
            assert f"{AT_EDGE} of " in test.obstacle
            assert f"of {name} r=4" in test.obstacle
        assert test.obstacle in verdict.comparisons[0].sentence()
        assert "A decision needs best learning rates inside their sweeps, not at the edge." in verdict.headline
        assert "swept alike" not in verdict.headline


def test_a_small_difference_between_well_measured_methods_is_equivalent():
    verdict = verdict_of(base(1.0), runs("fb", FB, 0.5), random(0.501))
    (test,) = verdict.comparisons[0].tests
    assert test.outcome == EQUIVALENT
    assert test.margin == pytest.approx(0.05, rel=0.05)
    low, high = test.found.ci90
    assert -test.margin < low < high < test.margin


def test_the_margin_is_a_share_of_the_gain_on_the_controls_own_prompts():
    """A run whose held-out loss is of another template begins at another loss than the base model's row shows."""
    own = {"plan": {**RANDOM, "a_init": "zeros"}, "heldout": {"before": {"loss": 0.7}}}
    controls = [dataclasses.replace(one, record={**one.record, **own}) for one in random(0.5)]
    (test,) = verdict_of(base(1.0), runs("fb", FB, 0.5), controls).comparisons[0].tests
    assert test.margin == pytest.approx(0.02, rel=0.1)


def test_without_a_base_model_there_is_no_margin_and_nothing_is_equivalent():
    (test,) = verdict_of(runs("fb", FB, 0.5), random(0.5)).comparisons[0].tests
    assert (test.margin, test.outcome) == (None, UNDECIDED)


def test_a_control_that_training_harmed_gives_no_margin():
    verdict = verdict_of(base(0.5), runs("fb", FB, 0.6), random(0.6))
    assert outcomes(verdict)["fb", RANDOM_B, False] == UNDECIDED


def test_the_grids_margin_replaces_the_default():
    groups = base(1.0), runs("fb", FB, 0.5, 0.004), random(0.5, deviation=0.004, stream=7)
    assert verdict_of(*groups, margin={LOSS: 0.2}).comparisons[0].tests[0].margin == 0.2
    wide, narrow = (verdict_of(*groups, margin=share).comparisons[0].tests[0] for share in (0.5, 0.001))
    assert wide.margin == pytest.approx(500 * narrow.margin)
    assert (wide.outcome, narrow.outcome) == (EQUIVALENT, UNDECIDED)


def test_an_undecided_test_says_how_many_more_seeds_would_decide():
    verdict = verdict_of(runs("fb", FB, 0.5, 0.02, range(4), stream=2), random(0.52, deviation=0.02, seeds=range(4), stream=52))
    (test,) = verdict.comparisons[0].tests
    assert test.outcome == UNDECIDED
    assert 1 <= test.more_seeds <= 40
    assert test.more_records is None  # more records do not reduce what seeds vary
    for seeds, records, said in ((1, 1, "1 more seed or 1 more record"), (2, None, "2 more seeds"), (None, None, "–")):
        changed = dataclasses.replace(test, more_seeds=seeds, more_records=records)
        comparison = dataclasses.replace(verdict.comparisons[0], tests=(changed,))
        group = SimpleNamespace(name="g", verdict=dataclasses.replace(verdict, comparisons=(comparison,)))
        assert verdict_table(group).rows[0][-1].text == said


def test_the_base_models_own_b_and_lora_of_the_same_size_are_controls_too(tmp_path):
    verdict = (
        summarise(
            collect(
                read_plan(
                    make_grid(
                        tmp_path,
                        [
                            Made("fb", "fb", rank=8, n_models=2, trained=1000),
                            Made("fb", "fb", rank=8, n_models=0, trained=1000),
                            Made("lora", "lora", rank=4, trained=1010),
                            Made("lora", "lora", rank=2, trained=500),
                        ],
                    )
                )
            )
        )
        .groups[0]
        .verdict
    )
    assert [(c.one.name, c.other.name, c.role) for c in verdict.comparisons] == [
        ("fb r=8 n=2", "fb r=8 n=0", BASE_B),
        ("fb r=8 n=2", "lora r=4", LORA_SIZE),
    ]


def test_without_an_informed_b_nothing_is_claimed():
    verdict = verdict_of(lora(0.5), base())
    assert verdict.headline.startswith("No conclusion about an informed B: no method here takes its B from fine-tuned models.")
    assert not verdict.comparisons


def test_other_methods_are_compared_with_lora_in_a_family_of_their_own():
    groups = base(), runs("fb", FB, 0.5), random(0.6), lora(0.6)
    dora = runs("dora", {"b_init": "zeros"}, 0.5, mode="dora", n_models=None)
    alone, joined = verdict_of(*groups), verdict_of(*groups, dora)
    *informed, other = joined.comparisons
    assert (other.one.name, other.role, other.baseline, other.tests[0].outcome) == ("dora r=4", LORA_RANK, True, BETTER)
    assert not any(comparison.baseline for comparison in informed)
    assert joined.headline == alone.headline
    assert [c.tests[0].p_holm for c in informed] == [c.tests[0].p_holm for c in alone.comparisons]
    assert other.tests[0].p_holm == other.tests[0].found.p_value
    assert "the 4 tests of this verdict, and separately over the 1 that compare other methods with LoRA" in joined.rule
    assert verdict_of(lora(0.6), dora).comparisons[0].baseline


def test_methods_on_a_changed_base_are_others_and_no_reference():
    started = {"start": "mean-delta"}
    verdict = verdict_of(
        base(),
        runs("fb", FB, 0.5),
        random(0.6),
        lora(0.62),
        runs("fb mean", {**FB, **started}, 0.4),
        runs("lora mean", {"b_init": "zeros", **started}, 0.5, mode="lora", n_models=5),
    )
    found = {(c.one.first.row.label, c.other.first.row.label, c.baseline) for c in verdict.comparisons}
    assert found == {
        *(("fb", other, False) for other in ("random", "lora", "base")),
        ("random", "lora", False),
        *((one, "lora", True) for one in ("fb mean", "lora mean")),
    }


def test_a_laplace_approximation_of_an_informed_b_is_no_informed_b():
    groups = base(), runs("fb", FB, 0.5), random(0.6), lora(0.62)
    averaged = [
        dataclasses.replace(one, record={**one.record, "laplace": {}})
        for one in runs("laplace tb", FB, 0.3, mode="laplace tb", n_models=5)
    ]
    alone, joined = verdict_of(*groups), verdict_of(*groups, averaged)
    assert joined.headline == alone.headline
    assert {(c.one.first.row.label, c.other.first.row.label, c.baseline) for c in joined.comparisons} == {
        *((c.one.first.row.label, c.other.first.row.label, c.baseline) for c in alone.comparisons),
        ("laplace tb", "lora", True),
    }


def test_a_b_from_the_gradient_has_the_controls_of_an_informed_one_in_a_family_of_its_own():
    groups = base(), runs("fb", FB, 0.55), random(0.6), lora(0.6)
    gradient = runs("fb gradient", GRADIENT, 0.5, n_models=None)
    alone, joined = verdict_of(*groups), verdict_of(*groups, gradient)
    count = len(alone.comparisons)
    assert [c.tests[0].p_holm for c in joined.comparisons[:count]] == [c.tests[0].p_holm for c in alone.comparisons]
    assert [(c.one.first.row.label, c.role, c.control, c.baseline, c.tests[0].outcome) for c in joined.comparisons[count:]] == [
        ("fb gradient", RANDOM_B, False, False, BETTER),
        ("fb gradient", LORA_RANK, False, False, BETTER),
    ]
    said = "Compared with a random orthonormal B, the B from the gradient is better in 1 (held-out loss) test."
    assert joined.headline == f"{alone.headline} {said}"
    assert "the 4 tests of this verdict, and separately over the 2 of the B from the gradient" in joined.rule


def test_a_b_from_the_gradient_without_its_control_or_in_a_mode_that_always_starts_there_claims_nothing():
    gradient = runs("fb gradient", GRADIENT, 0.5, n_models=None)
    headline = verdict_of(base(), gradient, lora(0.6)).headline
    assert "No conclusion about the B from the gradient: there is no finished run of its random control" in headline
    assert headline.endswith("--mode fb --rank 4 --b-init orthonormal.")
    one = runs("lora-one", GRADIENT, 0.5, mode="lora-one", n_models=None)
    verdict = verdict_of(base(), one, lora(0.6))
    assert "gradient" not in verdict.headline
    assert [comparison.baseline for comparison in verdict.comparisons] == [True]


def test_tests_without_a_p_value_are_not_among_those_that_the_rule_counts():
    fb, control = runs("fb", FB, 0.5), lora(0.5)
    same = {"rouge1": fb[0].measures[LOSS]}
    scored = [dataclasses.replace(one, measures={**one.measures, **same}) for one in (*fb, *control)]
    methods = [method for method in group_methods([*scored, *random(0.5)]) if method.first.row.learning_rate == 1e-3]
    verdict = judge(methods, [LOSS, "rouge1"])
    tests = [test for comparison in verdict.comparisons for test in comparison.tests]
    assert len(tests) == 4
    assert "correction over the 3 tests of this verdict (those that have a p-value)" in verdict.rule
    smallest = min(test.found.p_value for test in tests if test.found.p_value is not None)
    assert min(test.p_holm for test in tests if test.p_holm is not None) == pytest.approx(3 * smallest)


def test_a_verdict_without_a_p_value_says_so_in_its_rule():
    verdict = verdict_of(base(), runs("fb", FB, 0.5, seeds=(0,)), lora(0.6, seeds=(0,)))
    assert (
        "after Holm's correction over the tests that have a p-value (here none), however small the difference" in verdict.rule
    )


def test_all_tests_of_a_verdict_are_corrected_together_and_a_shared_control_counts_once():
    five = runs("fb five", FB, 0.5, n_models=5)
    verdict = verdict_of(base(), runs("fb", FB, 0.5), five, random(0.6), lora(0.6))
    tests = {id(test): test for comparison in verdict.comparisons for test in comparison.tests}
    # Each fb with the random B, LoRA and the base model, and the random B with LoRA.
    assert len(tests) == 7
    assert "correction over the 7 tests of this verdict" in verdict.rule
    smallest = min(test.found.p_value for test in tests.values())
    assert min(test.p_holm for test in tests.values()) == pytest.approx(7 * smallest)


def with_nll(results, shift=0.0):
    """The results with an NLL whose statistics are those of their held-out loss, moved by `shift` nats per token."""
    made = []
    for one in results:
        nats, tokens = one.measures[LOSS].statistics.T
        nll = dataclasses.replace(
            one.measures[LOSS],
            value=one.measures[LOSS].value + shift,
            statistics=np.stack([tokens, nats + shift * tokens], axis=1),
        )
        made.append(dataclasses.replace(one, measures={**one.measures, "nll": nll}))
    return made


@pytest.mark.parametrize(("shift", "measures"), [(0.0, [LOSS]), (0.001, [LOSS]), (0.2, [LOSS, "nll"])])
def test_the_nll_of_the_records_of_the_held_out_loss_is_no_second_measure_of_it(shift, measures):
    swept = group_methods(with_nll([*runs("fb", FB, 0.5), *random(0.6), *lora(0.62)], shift))
    chosen = [method for method in swept if method.first.row.learning_rate == 1e-3]
    verdict = judge(chosen, [LOSS, "nll"], rates_of(swept))
    assert all([test.measure for test in comparison.tests] == measures for comparison in verdict.comparisons)
    assert f"over the {3 * len(measures)} tests of this verdict" in verdict.rule


def test_the_nll_of_other_prompts_than_those_of_the_held_out_loss_is_tested():
    made = with_nll([*runs("fb", FB, 0.5), *random(0.6), *lora(0.62)])
    asked = [dataclasses.replace(one, generation={**one.generation, "template": "plain"}) for one in made]
    trained = [{**one.record, "data": {**one.record.get("data", {}), "template": "alpaca"}} for one in asked]
    asked = [dataclasses.replace(one, record=record) for one, record in zip(asked, trained, strict=True)]
    swept = group_methods(asked)
    chosen = [method for method in swept if method.first.row.learning_rate == 1e-3]
    verdict = judge(chosen, [LOSS, "nll"], rates_of(swept))
    assert {test.measure for comparison in verdict.comparisons for test in comparison.tests} == {LOSS, "nll"}


def test_the_nll_is_tested_where_no_loss_is_reported():
    swept = group_methods(with_nll([*runs("fb", FB, 0.5), *random(0.6)]))
    chosen = [method for method in swept if method.first.row.learning_rate == 1e-3]
    assert [test.measure for test in judge(chosen, ["nll"]).comparisons[0].tests] == ["nll"]
