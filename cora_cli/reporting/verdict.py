"""The verdict of `cora report`: does an informed B help, compared with its controls?

A B is informed if it starts as the subspace of fine-tuned models. A B that starts from the gradient of the training data has the same
controls, in a family of tests of its own. `outcomes` decides by the rule that the report prints.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from cora_cli.evaluation.metrics import LOWER_IS_BETTER
from cora_cli.experiments.stage_rules import MIN_SEEDS
from cora_cli.reporting.comparison import (
    BASE,
    BASE_B,
    LORA_RANK,
    LORA_SIZE,
    RANDOM_B,
    Comparison,
    is_informed,
    is_lora,
    is_of_gradient,
    lost_trainings,
    other_layers,
    plan_of,
    title,
)
from cora_cli.reporting.headline import gradient_headline, informed_headline
from cora_cli.reporting.learning_rate_sweep import RatesByMethod, rate_obstacle, rates_of
from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.outcomes import decide, level_at
from cora_cli.reporting.report_rows import Row
from cora_cli.reporting.statistics import LEVEL, Difference, MethodResults, compare, compute_intervals

# Ranks are integers, so the closest LoRA may differ by a few per cent in trained parameters and still count as equal.
_EQUAL_SIZE = 0.05
DEFAULT_MARGIN = 0.1
"""The margin of equivalence as a share of what training gains the control."""
_ROUNDED_LOSS = 0.01
"""How far the rounding of weights or of a dtype may move the loss of the same records."""
Margin = float | Mapping[str, float] | None
"""A share of what training gains, or margins by measure (measures without one get the default), or None for the default."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The headline, the comparisons behind it, and the rule that decided them."""

    headline: str
    comparisons: tuple[Comparison, ...]
    rule: str


def judge(
    methods: Sequence[MethodResults],
    measures: Sequence[str],
    rates: RatesByMethod | None = None,
    margin: Margin = None,
    looks: int | None = None,
    diverged: Collection[Row] = (),
) -> Verdict:
    """The verdict on one group of methods with the same data and evaluation.

    `rates` has the learning rates of the sweeps (default: those of `methods`), `margin` and `looks` are the grid's, `diverged` its rows whose
    training did.
    """
    rates = rates_of(methods) if rates is None else rates
    pairs = [pair for one in methods if is_informed(one) for pair in _controls(one, methods)]
    controls = {id(other) for _, other, _, _ in pairs}
    from_gradient = [
        pair for one in methods if is_of_gradient(one) for pair in _controls(one, methods) if pair[2] != BASE and not pair[3]
    ]
    chosen_b = [one for one in methods if is_informed(one) or is_of_gradient(one)]
    others = [
        pair
        for one in methods
        if one not in chosen_b and id(one) not in controls and not is_lora(one) and one.first.row.mode != "base"
        for pair in _controls(one, methods)
        if pair[2] in (LORA_RANK, LORA_SIZE) and not pair[3]
    ]
    (informed, tests), (data, data_tests), (baselines, other_tests) = (
        _compared(family, methods, measures, rates, margin, looks) for family in (pairs, from_gradient, others)
    )
    informed = _mark_uncontrolled(informed)
    baselines = [dataclasses.replace(comparison, baseline=True) for comparison in baselines]
    informed, data, baselines = (
        [dataclasses.replace(each, lost=lost_trainings((each.one, each.other), diverged)) for each in family]
        for family in (informed, data, baselines)
    )
    headline = " ".join(filter(None, (informed_headline(methods, informed), gradient_headline(methods, data))))
    rule = _rule(tests, data_tests, other_tests, margin, looks)
    return Verdict(headline, (*informed, *data, *baselines), rule)


def _mark_uncontrolled(informed: Sequence[Comparison]) -> list[Comparison]:
    controlled = {id(comparison.one) for comparison in informed if comparison.role == RANDOM_B}
    return [
        dataclasses.replace(comparison, uncontrolled=True)
        if comparison.role in (LORA_RANK, LORA_SIZE) and not comparison.control and id(comparison.one) not in controlled
        else comparison
        for comparison in informed
    ]


def _compared(
    pairs: Sequence[tuple[MethodResults, MethodResults, str, bool]],
    methods: Sequence[MethodResults],
    measures: Sequence[str],
    rates: RatesByMethod,
    margin: Margin,
    looks: int | None,
) -> tuple[list[Comparison], int]:
    """The comparisons of one family of tests, and the number of its p-values, over which they are corrected."""
    # A random control can stand under several informed methods; it counts as one family member.
    planned: dict[tuple[int, int, str], tuple[str, Difference, float | None, str]] = {}
    for one, other, _, _ in pairs:
        of_rates = rate_obstacle(one, other, rates)
        for name in measures:
            if name == "nll" and LOSS in measures and _is_loss_again(one) and _is_loss_again(other):
                continue
            key = (id(one), id(other), name)
            if key not in planned and (found := compare(one, other, name)) is not None:
                planned[key] = (name, found, _margin(margin, other, name, methods), of_rates)
    for confidence in (0.95, 0.90):
        compute_intervals([found for _, found, _, _ in planned.values()], confidence)
    tests = dict(zip(planned, decide(list(planned.values()), looks), strict=True))
    judged = [
        Comparison(
            one, other, role, tuple(tests[key] for name in measures if (key := (id(one), id(other), name)) in tests), control
        )
        for one, other, role, control in pairs
    ]
    return [comparison for comparison in judged if comparison.tests], sum(test.p_holm is not None for test in tests.values())


def _is_loss_again(method: MethodResults) -> bool:
    """Whether the NLL was measured on the prompts of the held-out loss, whose tests it would repeat."""
    pairs = [(result.measures.get(LOSS), result.measures.get("nll")) for result in method.results]
    return not any(result.asked_otherwise for result in method.results) and all(
        loss is not None
        and nll is not None
        and np.array_equal(loss.statistics[:, 1], nll.statistics[:, 0])  # their numbers of tokens
        and math.isclose(loss.value, nll.value, rel_tol=_ROUNDED_LOSS)
        for loss, nll in pairs
    )


def _rule(tests: int, data_tests: int, other_tests: int, margin: Margin, looks: int | None) -> str:
    share = margin if isinstance(margin, float | int) else DEFAULT_MARGIN
    stated = ", ".join(f"{title(name)} {value:g}" for name, value in margin.items()) if isinstance(margin, Mapping) else ""
    margins = f"{share:.0%} of the difference between the base model and the trained control"
    margins = f"{stated} as the grid states, otherwise {margins}" if stated else margins
    families = {
        "tests of this verdict": tests,
        "of the B from the gradient": data_tests,
        "that compare other methods with LoRA": other_tests,
    }
    counted = [f"the {count} {name}" for name, count in families.items() if count]
    family = (
        f"over {', and separately over '.join(counted)} (those that have a p-value)"
        if counted
        else "over the tests that have a p-value (here none)"
    )
    return (
        "Rule: seeds and records are both random and crossed; a difference has the variance σ²(seed)/S + σ²(record)/R + "
        f"σ²(interaction)/(S·R). Better or worse: p < {LEVEL:g} after Holm's correction {family}, "
        f"however small the difference. Equivalent: otherwise, if the 90 % interval lies inside ± the margin ({margins}; there is none without a base model, or where training gained nothing). Otherwise "
        f"undecided, which does not mean equal. Nothing is decided with fewer than {MIN_SEEDS} seeds on a side, nor unless the learning "
        "rates were swept alike: equally many on both sides, more than one, over ranges of about the same width, and the chosen one not at the edge of its range. "
        "An NLL on the records of the held-out loss is that loss, and is not tested again. The "
        "intervals are not corrected for multiple tests. would decide: about how many more seeds per method, or more records, if the "
        "difference and the variances stayed as estimated; – if neither would within reason. A B gets credit for its information only "
        "where it is also better than a random B." + _looks_in_words(looks)
    )


def _looks_in_words(looks: int | None) -> str:
    if looks is None or looks <= 1:
        return ""
    last = MIN_SEEDS + looks - 1
    return (
        f" The grid looked after {MIN_SEEDS} seeds and after each further one up to {last}, and trained no more seeds where the verdict was "
        f"decided; so that all looks together have the level {LEVEL:g}, p-values were multiplied by {LEVEL / level_at(MIN_SEEDS, looks):.3g} before "
        f"seed {last} and by {LEVEL / level_at(last, looks):.3g} there, and the intervals for equivalence widened alike."
    )


def _margin(margin: Margin, other: MethodResults, name: str, methods: Sequence[MethodResults]) -> float | None:
    if isinstance(margin, Mapping) and name in margin:
        return float(margin[name])
    base, trained = _base_value(other, name, methods), other.estimate(name)
    if base is None or trained is None or other.first.row.mode == "base":
        return None
    share = margin if isinstance(margin, float | int) else DEFAULT_MARGIN
    gain = base - trained.value if name == LOSS or name in LOWER_IS_BETTER else trained.value - base
    return gain * share if gain > 0 else None  # training that harmed the control shows no scale of a gain


def _base_value(trained: MethodResults, name: str, methods: Sequence[MethodResults]) -> float | None:
    """The base model's value; that of the held-out loss is also the loss before training of a run that starts there.

    The method's own loss before training comes first, since other runs may have measured that of other prompts.
    """
    if name == LOSS and (own := _loss_before(trained)) is not None:
        return own
    alike = [method for method in methods if method.first.row.model == trained.first.row.model]
    for method in alike:
        estimate = method.estimate(name) if method.first.row.mode == "base" else None
        if estimate is not None:
            return estimate.value
    return next((loss for method in alike if name == LOSS and (loss := _loss_before(method)) is not None), None)


def _loss_before(method: MethodResults) -> float | None:
    """The held-out loss of a method's first run before training, where that is the base model's."""
    heldout = method.first.record.get("heldout")
    return float(heldout["before"]["loss"]) if heldout and method.first.starts_at_base else None


def _controls(one: MethodResults, methods: Sequence[MethodResults]) -> list[tuple[MethodResults, MethodResults, str, bool]]:
    """(one, other, role, control) for each control of `one`; below each LoRA stands the random control against the same LoRA."""
    row, trained = one.first.row, one.first.trained
    found = []
    random = [other for other in methods if _like(other, one) and plan_of(other).get("b_init") == "orthonormal"]
    for role in (RANDOM_B, BASE_B, LORA_RANK, LORA_SIZE, BASE):
        for other in methods:
            theirs = other.first.row
            # A rank in other layers stands for another number of parameters.
            same_rank = theirs.rank == row.rank and not other_layers(one, other)
            size = other.first.trained
            fits = {
                RANDOM_B: any(other is control for control in random),
                BASE_B: _like(other, one) and plan_of(other).get("b_init") == "basis" and theirs.n_models == 0,
                LORA_RANK: is_lora(other) and same_rank,
                LORA_SIZE: is_lora(other)
                and not same_rank
                and bool(size and trained)
                and abs((size or 0) - (trained or 0)) <= _EQUAL_SIZE * (trained or 0),
                BASE: theirs.mode == "base",
            }
            if fits[role] and theirs.model == row.model:
                found.append((one, other, role, False))
                if role in (LORA_RANK, LORA_SIZE):
                    found += [(control, other, role, True) for control in random]
    return found


def _like(other: MethodResults, one: MethodResults) -> bool:
    theirs, row = other.first.row, one.first.row
    starts = plan_of(other).get("start"), plan_of(one).get("start")
    same = (theirs.mode, theirs.rank, theirs.model, starts[0]) == (row.mode, row.rank, row.model, starts[1])
    return same and not other_layers(one, other)
