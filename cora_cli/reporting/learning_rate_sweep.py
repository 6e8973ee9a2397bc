"""Chooses each method's learning rate from its sweep, by the lowest validation loss (held-out loss where a run has none).

A grid with the sections `sweep` and `confirm` has chosen already, and its plan says how.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.report_rows import Row
from cora_cli.reporting.statistics import MethodResults

VALIDATION, HELD_OUT = "validation loss", "held-out loss"
UNSWEPT, AT_EDGE = "learning rates not swept alike", "best learning rate at the edge of the sweep"
"""Why nothing is decided between two methods."""
WIDTHS = 0.5
"""The least width of one method's range of rates relative to the other's, both as logarithms."""


@dataclasses.dataclass(frozen=True)
class Rates:
    """The learning rates of a method: those that were planned, and all that were tried."""

    planned: frozenset[float | None]
    tried: frozenset[float | None]

    def has_at_edge(self, rate: float | None) -> bool:
        """Whether this rate is the lowest or the highest one that was tried."""
        known = [other for other in self.tried if other is not None]
        return len(known) > 1 and rate in (min(known), max(known))


RatesByMethod = Mapping[tuple[object, ...], Rates]


def rates_of(
    methods: Sequence[MethodResults], sweeps: Sequence[Mapping[str, Any]] = (), diverged: Sequence[Row] = ()
) -> dict[tuple[object, ...], Rates]:
    """The rates of each method by `Row.identity`: those in `methods` and of the rows that `diverged`, or those of its sweep among the grid's `sweeps`."""
    trained: dict[tuple[object, ...], set[float | None]] = {}
    for row in (*(method.first.row for method in methods), *diverged):
        trained.setdefault(row.identity, set()).add(row.learning_rate)
    found = {identity: Rates(frozenset(rates), frozenset(rates)) for identity, rates in trained.items()}
    by_plan = {tuple(swept["method"]): swept for swept in sweeps}
    for method in methods:
        if swept := by_plan.get(method.planned_as):
            found[method.identity] = Rates(frozenset(swept["planned"]), frozenset(map(float, swept["losses"])))
    return found


def choose_learning_rates(
    methods: Sequence[MethodResults], diverged: Sequence[Row] = ()
) -> tuple[list[MethodResults], str | None]:
    """For each method trained at several learning rates, choose the rate with the lowest loss (mean over `deciding_seeds`), none at which a seed
    `diverged` if there is another one.

    The loss is the validation loss if every run of the sweep has one, else the held-out loss. Returns the chosen methods, and VALIDATION
    or HELD_OUT, or None if there was nothing to choose. If the held-out loss is missing as well, all rates are kept.
    """
    rates: dict[tuple[object, ...], list[MethodResults]] = {}
    for method in methods:
        rates.setdefault(method.identity, []).append(method)
    swept = [method for candidates in rates.values() if len(candidates) > 1 for method in candidates]
    validated = all(result.validation_loss is not None for method in swept for result in method.results)
    by = VALIDATION if validated else HELD_OUT
    chosen, any_choice = [], False
    for trained in rates.values():
        candidates = eligible(trained, diverged)
        losses = [_losses(method, by) for method in candidates]
        any_choice |= len(candidates) < len(trained)
        if len(candidates) > 1 and all(losses):
            any_choice = True
            seeds = deciding_seeds(candidates, by)
            means = [fmean(loss for seed, loss in one.items() if not seeds or seed in seeds) for one in losses]
            chosen.append(candidates[means.index(min(means))])
        else:
            chosen += candidates
    return chosen, by if any_choice else None


def eligible(rates: Sequence[MethodResults], diverged: Sequence[Row]) -> Sequence[MethodResults]:
    """The learning rates of a method at which no seed `diverged`: the seeds that are left would favour a rate. All of them where none is left."""
    lost = {(row.identity, row.learning_rate) for row in diverged}
    return [one for one in rates if (one.identity, one.first.row.learning_rate) not in lost] or rates


def deciding_seeds(rates: Sequence[MethodResults], by: str) -> set[int]:
    """The seeds at which every learning rate of a method has the loss `by` which one is chosen. Seeds differ in their loss, too, so that the others
    would favour a rate; where no seed has all rates, all seeds decide."""
    return set.intersection(*({*_losses(method, by)} for method in rates))


def _losses(method: MethodResults, by: str) -> dict[int, float]:
    """The validation loss or the held-out loss of each seed that has it."""
    if by == VALIDATION:
        return {result.row.seed: loss for result in method.results if (loss := result.validation_loss) is not None}
    return {result.row.seed: result.measures[LOSS].value for result in method.with_measure(LOSS)}


def at_edge(method: MethodResults, rates: RatesByMethod) -> bool:
    """Whether the method's learning rate is the lowest or the highest of its sweep."""
    return rates[method.identity].has_at_edge(method.first.row.learning_rate)


def rate_obstacle(one: MethodResults, other: MethodResults, rates: RatesByMethod) -> str:
    """Why the choice of learning rates does not let two methods be compared; empty where it does.

    Both must have tried equally many rates, and more than one, over ranges of about one width: methods of different scale need different
    ranges. The chosen rate must lie inside what
    was tried (widened rates included) on both sides, since beyond an edge the method may be better still. A base model, and a method that trains nothing,
    have no rate to choose.
    """
    if None in (one.first.row.learning_rate, other.first.row.learning_rate):
        return ""
    first, second = rates[one.identity].planned, rates[other.identity].planned
    if len(first) < 2 or len(first) != len(second):
        return UNSWEPT
    narrow, wide = sorted((_width(first), _width(second)))
    if narrow < WIDTHS * wide:
        return UNSWEPT
    edges = [method.name for method in (one, other) if method.has_seeds() and at_edge(method, rates)]
    if not edges:
        return ""
    return f"{AT_EDGE} of {' and of '.join(edges)}"


def _width(rates: frozenset[float | None]) -> float:
    """Logarithm of the highest rate over the lowest."""
    known = [rate for rate in rates if rate is not None]
    return math.log(max(known) / min(known)) if known else 0.0
