"""Successive halving over learning rates: who goes on, who is dropped, and when a sweep is widened."""

import math
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cora_cli.experiments.sweep import Sweep, SweepRule, beyond, survivors, sweep

RULE = SweepRule(seeds=(100,), rungs=(2, 4, 8))
RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def measured(table: Mapping[float, Mapping[int, float]]) -> Callable[[float, int], float | None]:
    return lambda rate, step: table.get(rate, {}).get(step)


def always(values: Mapping[float, float]) -> Callable[[float, int], float | None]:
    return lambda rate, step: values.get(rate)


def test_the_first_round_measures_every_rate_at_the_first_rung() -> None:
    state = sweep(RATES, 8, RULE, measured({}))
    assert state.pending == tuple((rate, 2) for rate in RATES)
    assert state.chosen is None


def test_the_worse_half_is_dropped_at_each_rung_until_two_are_left_which_the_end_decides() -> None:
    first = {1e-3: {2: 4.0}, 3e-3: {2: 2.0}, 1e-2: {2: 1.0}, 3e-2: {2: 3.0}}
    state = sweep(RATES, 8, RULE, measured(first))
    assert state.pending == ((3e-3, 4), (1e-2, 4))
    assert state.dropped == {1e-3: 2, 3e-2: 2}
    second = {**first, 3e-3: {2: 2.0, 4: 1.8}, 1e-2: {2: 1.0, 4: 0.9}}
    state = sweep(RATES, 8, RULE, measured(second))
    assert state.pending == ((3e-3, 8), (1e-2, 8))
    third = {**second, 3e-3: {2: 2.0, 4: 1.8, 8: 0.5}, 1e-2: {2: 1.0, 4: 0.9, 8: 0.6}}
    state = sweep(RATES, 8, RULE, measured(third))
    assert (state.pending, state.chosen, state.added) == ((), 3e-3, None)
    assert state.dropped == {1e-3: 2, 3e-2: 2, 1e-2: 8}


def test_a_rate_close_to_the_best_is_not_dropped() -> None:
    losses = {1e-3: 1.019, 3e-3: 1.0, 1e-2: 1.01, 3e-2: 1.2}
    assert survivors(losses, 0.02) == [1e-3, 3e-3, 1e-2]
    assert survivors(losses, 0.0) == [3e-3, 1e-2]


def test_half_of_five_rates_is_three_and_two_stay_until_the_last_rung() -> None:
    losses = dict(zip((1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (5.0, 4.0, 1.0, 2.0, 3.0), strict=True))
    assert survivors(losses, 0.0) == [1e-3, 3e-3, 1e-2]
    two = {rate: losses[rate] for rate in (1e-3, 3e-3)}
    assert survivors(two, 0.0) == [1e-3, 3e-3]
    assert survivors(two, 0.0, least=1) == [1e-3]


def test_rates_that_stay_close_are_compared_at_the_end() -> None:
    state = sweep((1e-3, 3e-3), 8, SweepRule((100,), (2, 8), slack=0.5), always({1e-3: 1.1, 3e-3: 1.0, 9e-3: 1.2}))
    assert state.losses[1e-3] == {2: 1.1, 8: 1.1}
    assert state.chosen == 3e-3


def test_a_best_rate_at_the_edge_is_widened_once() -> None:
    values = {1e-3: 4.0, 3e-3: 3.0, 1e-2: 2.0, 3e-2: 1.0}
    state = sweep(RATES, 8, RULE, always(values))
    assert (state.pending, state.added, state.chosen) == (((0.09, 8),), 0.09, None)
    better = sweep(RATES, 8, RULE, always({**values, 0.09: 0.5}))
    assert (better.chosen, better.at_edge, better.pending) == (0.09, True, ())
    worse = sweep(RATES, 8, RULE, always({**values, 0.09: 1.5}))
    assert (worse.chosen, worse.at_edge) == (3e-2, False)
    assert sweep(RATES, 8, SweepRule((100,), (2, 4, 8), widen=False), always(values)).chosen == 3e-2


def test_the_added_rate_keeps_the_ratio_of_its_neighbours() -> None:
    assert beyond((1e-3, 3e-3, 1e-2), 1e-3) == pytest.approx(3.33e-4)
    assert beyond((1e-3, 3e-3, 1e-2), 1e-2) == pytest.approx(3.33e-2)
    assert beyond((1e-3, 3e-3, 1e-2), 3e-3) is None
    assert beyond((1e-3,), 1e-3) is None


def test_a_rate_that_diverged_has_lost() -> None:
    state = sweep(RATES, 8, RULE, always({1e-3: 2.0, 3e-3: 1.0, 1e-2: math.inf, 3e-2: math.inf}))
    assert state.chosen == 3e-3
    assert state.dropped == {1e-2: 2, 3e-2: 2, 1e-3: 8}
    lost = sweep(RATES, 8, RULE, always(dict.fromkeys(RATES, math.inf)))
    assert (lost.chosen, lost.pending) == (None, ())


def test_a_rate_that_alone_did_not_diverge_goes_on_to_the_last_rung_where_another_is_added() -> None:
    steps = {1e-3: {2: 2.0, 4: 1.5, 8: 1.0}, 3e-3: {2: math.inf}, 1e-2: {2: math.inf}, 3e-2: {2: math.inf}}
    known = {rate: dict(list(losses.items())[:1]) for rate, losses in steps.items()}
    assert sweep(RATES, 8, RULE, measured(known)).pending == ((1e-3, 4),)
    state = sweep(RATES, 8, RULE, measured(steps))
    assert state.pending == ((3.33e-4, 8),)
    assert sweep(RATES, 8, RULE, measured({**steps, 3.33e-4: {8: 0.5}})).chosen == 3.33e-4


def test_one_rate_is_no_sweep_but_is_chosen() -> None:
    state = sweep((1e-3,), 8, RULE, always({1e-3: 1.0}))
    assert (state.chosen, state.added) == (1e-3, None)


@given(
    st.dictionaries(
        st.sampled_from([1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]),
        st.lists(st.one_of(st.floats(0.1, 10), st.just(math.inf)), min_size=3, max_size=3),
        min_size=1,
    )
)
def test_a_sweep_that_measures_what_it_asks_for_ends_and_never_asks_twice(table: dict[float, list[float]]) -> None:
    known: dict[tuple[float, int], float] = {}
    state: Sweep | None = None
    for _ in range(8):
        state = sweep(list(table), 8, RULE, lambda rate, step: known.get((rate, step)))
        if not state.pending:
            break
        for rate, step in state.pending:
            assert (rate, step) not in known
            known[rate, step] = table.get(rate, [5.0, 5.0, 5.0])[(2, 4, 8).index(step)]
    assert state is not None
    assert not state.pending
    if state.chosen is not None:
        last = max(state.losses[state.chosen])
        others = [losses[last] for losses in state.losses.values() if last in losses]
        assert state.losses[state.chosen][last] == min(others)
