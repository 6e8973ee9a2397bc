from cora_cli.reporting.learning_rate_sweep import at_edge, choose_learning_rates, rates_of, swept_alike
from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.statistics import group_methods

from .helpers import result


def test_learning_rates_are_chosen_by_the_mean_held_out_loss_of_the_seeds():
    def at(rate, seed, loss, label="fb"):
        return result(label, seed, rate, **{LOSS: [[loss * 5, 5]]})

    methods = group_methods([at(1e-4, 0, 1.0), at(1e-4, 1, 1.2), at(1e-3, 0, 0.9), at(1e-3, 1, 1.4), at(1e-3, 0, 2.0, "lora")])
    chosen, selected_by = choose_learning_rates(methods)
    assert [(m.first.row.label, m.first.row.learning_rate) for m in chosen] == [("fb", 1e-4), ("lora", 1e-3)]
    assert selected_by == "held-out loss"


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


def test_methods_are_swept_alike_with_the_same_rates_or_with_as_many_around_the_chosen_ones():
    def methods(label, *rates):
        return group_methods([result(label, rate=rate) for rate in rates])

    fb, same, higher, single = (
        methods("fb", 1e-4, 1e-3, 1e-2),
        methods("same", 1e-4, 1e-3, 1e-2),
        methods("higher", 1e-3, 1e-2, 1e-1),
        methods("single", 1e-3),
    )
    swept = [*fb, *same, *higher, *single]
    assert swept_alike(fb[0], same[1], rates_of(swept))
    assert swept_alike(fb[1], higher[1], rates_of(swept))
    assert not swept_alike(fb[1], higher[0], rates_of(swept))  # a lower rate may be better still
    assert not swept_alike(fb[1], single[0], rates_of(swept))
    assert not swept_alike(single[0], single[0], rates_of(swept))  # one rate is no sweep
    assert swept_alike(fb[0], result_without_a_rate(), rates_of(swept))


def result_without_a_rate():
    (base,) = group_methods([result("base", rate=None)])
    return base
