import pytest
import scipy.stats

from cora_cli.reporting.collect import collect
from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.report_rows import read_plan
from cora_cli.reporting.summary import summarise
from cora_cli.reporting.verdict import BASE, BASE_B, BETTER, LORA_RANK, LORA_SIZE, NONE, RANDOM_B, WORSE
from tests.reporting.helpers import Made, make_grid


@pytest.fixture(scope="module")
def group(made_grid):
    return summarise(collect(read_plan(made_grid))).groups[0]


def verdict_of(tmp_path, *rows):
    return summarise(collect(read_plan(make_grid(tmp_path, list(rows))))).groups[0].verdict


def test_a_b_that_helps_is_better_than_each_control_in_every_measure(group):
    assert {comparison.role for comparison in group.verdict.comparisons} == {RANDOM_B, LORA_RANK, BASE}
    for comparison in group.verdict.comparisons:
        assert {test.outcome for test in comparison.tests} == {BETTER}
        assert all((test.agreeing, test.seeds) == (2, 2) for test in comparison.tests)
    assert group.verdict.headline == (
        "Compared with a random orthonormal B, the informed B was better in 4 of 4 tests and worse in none. "
        "Compared with LoRA at equal rank, the informed B was better in 4 of 4 tests and worse in none."
    )


def test_a_lower_loss_is_better_and_is_said_with_its_sign(group):
    comparison = next(comparison for comparison in group.verdict.comparisons if comparison.role == RANDOM_B)
    loss = next(test for test in comparison.tests if test.measure == LOSS)
    assert loss.paired.difference < 0
    assert "better in held-out loss (-0.2" in comparison.sentence()


def test_equal_methods_have_no_shown_difference(tmp_path):
    verdict = verdict_of(
        tmp_path,
        Made("fb", "fb", skill=0.5, loss=1.0, n_models=2),
        Made("fb orthonormal", "fb", skill=0.5, loss=1.0, b_init="orthonormal"),
    )
    assert verdict.headline.startswith(
        "Compared with a random orthonormal B, the informed B made no difference that could be shown in any of 4 tests."
    )
    assert (
        "No conclusion about LoRA at equal rank: there is no finished run of it. Train it with --mode lora --rank 4."
        in verdict.headline
    )
    (comparison,) = verdict.comparisons
    assert (
        "(random orthonormal B): no difference could be shown in any of the 4 measures; the held-out loss differs by "
        in comparison.sentence()
    )


def test_a_b_that_hurts_is_called_worse(tmp_path):
    verdict = verdict_of(
        tmp_path,
        Made("fb", "fb", skill=0.3, loss=1.3, n_models=2),
        Made("fb orthonormal", "fb", skill=0.9, loss=0.8, b_init="orthonormal"),
    )
    assert "was worse in 4 of 4 tests and better in none" in verdict.headline
    assert {test.outcome for test in verdict.comparisons[0].tests} == {WORSE}
    assert verdict.headline.endswith("trained with only one seed, so the spread over seeds is unknown.")


def test_a_difference_that_one_seed_denies_is_not_called_one(tmp_path):
    skills = {0: 0.95, 1: 0.95, 2: 0.45}
    rows = [Made("fb", "fb", seed, skill, loss=1.0, n_models=2) for seed, skill in skills.items()]
    rows += [Made("fb orthonormal", "fb", seed, 0.5, loss=1.0, b_init="orthonormal") for seed in skills]
    (comparison,) = verdict_of(tmp_path, *rows).comparisons
    test = next(test for test in comparison.tests if test.measure == "rouge1")
    assert test.p_holm < 0.05
    assert (test.agreeing, test.seeds, test.outcome) == (2, 3, NONE)


def test_differences_of_equal_seeds_have_the_t_interval_of_their_own(tmp_path):
    rows = [Made("fb", "fb", seed, 0.5 + 0.1 * seed, n_models=2) for seed in (0, 1, 2)]
    rows += [Made("fb orthonormal", "fb", seed, 0.4, b_init="orthonormal") for seed in (0, 1, 2)]
    (comparison,) = verdict_of(tmp_path, *rows).comparisons
    test = next(test for test in comparison.tests if test.measure == "rouge1")
    ours, theirs = (
        [result.measures["rouge1"].value for result in method.results] for method in (comparison.one, comparison.other)
    )
    paired = scipy.stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    mean, half = test.over_seeds
    assert (mean - half, mean + half) == pytest.approx((paired.low, paired.high))


def test_the_base_models_own_b_and_lora_of_the_same_size_are_controls_too(tmp_path):
    verdict = verdict_of(
        tmp_path,
        Made("fb", "fb", rank=8, n_models=2, trained=1000),
        Made("fb", "fb", rank=8, n_models=0, trained=1000),
        Made("lora", "lora", rank=4, trained=1010),
        Made("lora", "lora", rank=2, trained=500),
    )
    assert [(c.one.name, c.other.name, c.role) for c in verdict.comparisons] == [
        ("fb r=8 n=2", "fb r=8 n=0", BASE_B),
        ("fb r=8 n=2", "lora r=4", LORA_SIZE),
    ]


def test_without_an_informed_b_nothing_is_claimed(tmp_path):
    verdict = verdict_of(tmp_path, Made("lora", "lora"), Made("base", "base", rank=None, rate=None))
    assert verdict.headline.startswith("No conclusion about an informed B: no method here takes its B from fine-tuned models.")
    assert not verdict.comparisons


def test_all_tests_of_a_verdict_are_corrected_together(group):
    tests = [test for comparison in group.verdict.comparisons for test in comparison.tests]
    assert len(tests) == 12
    assert f"the {len(tests)} tests of this verdict" in group.verdict.rule
    smallest = min(test.paired.p_value for test in tests)
    assert min(test.p_holm for test in tests) == pytest.approx(12 * smallest)
    assert NONE in group.verdict.rule
