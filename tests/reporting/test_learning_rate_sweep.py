import dataclasses

import pytest

from cora_cli.reporting.learning_rate_sweep import (
    AT_EDGE,
    UNSWEPT,
    at_edge,
    choose_learning_rates,
    deciding_seeds,
    rate_obstacle,
    rates_of,
)
from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.statistics import group_methods

from .helpers import ROW, result


def test_learning_rates_are_chosen_by_the_mean_held_out_loss_of_the_seeds():
    def at(rate, seed, loss, label="fb"):
        return result(label, seed, rate, **{LOSS: [[loss * 5, 5]]})

    methods = group_methods([at(1e-4, 0, 1.0), at(1e-4, 1, 1.2), at(1e-3, 0, 0.9), at(1e-3, 1, 1.4), at(1e-3, 0, 2.0, "lora")])
    chosen, selected_by = choose_learning_rates(methods)
    assert [(m.first.row.label, m.first.row.learning_rate) for m in chosen] == [("fb", 1e-4), ("lora", 1e-3)]
    assert selected_by == "held-out loss"


@pytest.mark.parametrize("by", ["validation loss", "held-out loss"])
def test_seeds_that_not_every_learning_rate_has_finished_do_not_decide(by):
    def at(rate, seed, loss):
        record = {"validation": {"loss": loss}} if by == "validation loss" else {}
        return result("fb", seed, rate, record, **{LOSS: [[loss * 5, 5]]})

    # The lower rate is better at the seed that both have; its other seed is one at which every loss is high.
    methods = group_methods([at(1e-4, 0, 1.0), at(1e-4, 1, 3.0), at(1e-3, 0, 1.5)])
    assert deciding_seeds(methods, by) == {0}
    assert [method.first.row.learning_rate for method in choose_learning_rates(methods)[0]] == [1e-4]
    apart = group_methods([at(1e-4, 1, 3.0), at(1e-3, 0, 1.5)])
    assert deciding_seeds(apart, by) == set()
    assert [method.first.row.learning_rate for method in choose_learning_rates(apart)[0]] == [1e-3]


def test_a_rate_at_which_a_seed_diverged_is_tried_and_not_chosen():
    def at(rate, seed, loss, label="fb"):
        return result(label, seed, rate, **{LOSS: [[loss * 5, 5]]})

    # At the highest rate one seed diverged, and the others are better than all at lower rates.
    methods = group_methods(
        [at(rate, seed, loss) for rate, loss in ((1e-4, 1.2), (1e-3, 1.0)) for seed in (0, 1)] + [at(1e-2, 1, 0.5)]
    )
    lost = dataclasses.replace(ROW, learning_rate=1e-2)
    chosen, by = choose_learning_rates(methods, [lost])
    assert ([method.first.row.learning_rate for method in chosen], by) == ([1e-3], "held-out loss")
    assert [method.first.row.learning_rate for method in choose_learning_rates(methods)[0]] == [1e-2]
    # None is left without a loss.
    everywhere = [dataclasses.replace(ROW, learning_rate=rate) for rate in (1e-4, 1e-3, 1e-2)]
    assert choose_learning_rates(methods, everywhere) == choose_learning_rates(methods)


def test_a_rate_at_which_every_seed_diverged_bounds_the_sweep():
    fb = [result("fb", 0, rate, rouge1=[0.1]) for rate in (1e-4, 1e-3)]
    lora = [result("lora", 0, rate, rouge1=[0.1]) for rate in (1e-4, 1e-3, 1e-2)]
    methods = group_methods([*fb, *lora])
    rates = rates_of(methods, diverged=[dataclasses.replace(ROW, learning_rate=1e-2)])
    found = {(method.first.row.label, method.first.row.learning_rate): method for method in methods}
    assert rate_obstacle(found["fb", 1e-3], found["lora", 1e-3], rates) == ""
    assert rate_obstacle(found["fb", 1e-3], found["lora", 1e-3], rates_of(methods)) == UNSWEPT


def test_without_held_out_losses_every_learning_rate_stays():
    methods = group_methods([result(rate=1e-4, rouge1=[0.1]), result(rate=1e-3, rouge1=[0.2])])
    assert choose_learning_rates(methods) == (methods, None)


def test_learning_rates_are_chosen_by_the_validation_loss_where_every_swept_run_has_one():
    def at(rate, heldout, validation, label="fb"):
        record = {"validation": {"loss": validation}} if validation else {}
        return result(label, 0, rate, record, **{LOSS: [[heldout * 5, 5]]})

    swept = [at(1e-4, 1.0, 2.0), at(1e-3, 2.0, 1.0)]
    methods = group_methods([*swept, at(1e-3, 1.0, None, "lora")])
    chosen, selected_by = choose_learning_rates(methods)
    assert [method.first.row.learning_rate for method in chosen] == [1e-3, 1e-3]
    assert selected_by == "validation loss"
    chosen, selected_by = choose_learning_rates(group_methods([swept[0], at(1e-3, 2.0, None)]))
    assert [method.first.row.learning_rate for method in chosen] == [1e-4]
    assert selected_by == "held-out loss"


def test_only_the_ends_of_a_sweep_are_its_edge():
    methods = group_methods([result(rate=rate) for rate in (1e-4, 1e-3, 1e-2)] + [result("lora", rate=1e-4)])
    assert [at_edge(method, rates_of(methods)) for method in methods] == [True, False, True, False]


def test_methods_are_swept_alike_with_as_many_rates_and_the_chosen_ones_inside():
    def methods(label, *rates):
        return group_methods([result(label, rate=rate) for rate in rates])

    fb, same, higher, single = (
        methods("fb", 1e-4, 1e-3, 1e-2),
        methods("same", 1e-4, 1e-3, 1e-2),
        methods("higher", 1e-3, 1e-2, 1e-1),
        methods("single", 1e-3),
    )
    sham, wide = methods("sham", 9.9e-4, 1e-3, 1.01e-3), methods("wide", 1e-5, 1e-3, 1e-1)
    rates = rates_of([*fb, *same, *higher, *single, *sham, *wide])
    assert rate_obstacle(fb[1], sham[1], rates) == rate_obstacle(sham[1], fb[1], rates) == UNSWEPT
    assert rate_obstacle(fb[1], wide[1], rates) == ""
    assert rate_obstacle(fb[1], same[1], rates) == rate_obstacle(fb[1], higher[1], rates) == ""
    assert rate_obstacle(fb[1], single[0], rates) == UNSWEPT
    assert rate_obstacle(single[0], single[0], rates) == UNSWEPT  # one rate is no sweep
    assert rate_obstacle(fb[0], result_without_a_rate(), rates) == ""


def test_a_rate_at_the_edge_of_its_sweep_is_an_obstacle_even_if_both_methods_tried_the_same():
    fb, lora = (group_methods([result(label, rate=rate) for rate in (1e-4, 1e-3, 1e-2)]) for label in ("fb", "lora"))
    rates = rates_of([*fb, *lora])
    # A lower, or a higher, rate may be better still.
    assert rate_obstacle(fb[0], lora[1], rates) == f"{AT_EDGE} of fb r=4 n=1"
    assert rate_obstacle(fb[1], lora[2], rates) == f"{AT_EDGE} of lora r=4 n=1"
    assert rate_obstacle(fb[2], lora[0], rates) == f"{AT_EDGE} of fb r=4 n=1 and of lora r=4 n=1"


def test_a_sweep_that_was_widened_beyond_its_best_rate_has_it_inside():
    (fb,), (lora,) = (group_methods([result(label, rate=1e-2)]) for label in ("fb", "lora"))

    def swept(method, *tried):
        return {"method": method.planned_as, "planned": [1e-4, 1e-3, 1e-2], "losses": {str(rate): {} for rate in tried}}

    narrow, wide = (1e-4, 1e-3, 1e-2), (1e-4, 1e-3, 1e-2, 1e-1)
    assert rate_obstacle(fb, lora, rates_of([fb, lora], [swept(fb, *wide), swept(lora, *wide)])) == ""
    assert (
        rate_obstacle(fb, lora, rates_of([fb, lora], [swept(fb, *wide), swept(lora, *narrow)])) == f"{AT_EDGE} of lora r=4 n=1"
    )


def result_without_a_rate():
    (base,) = group_methods([result("base", rate=None)])
    return base
