"""Summarises a collection, one summary per group: methods, estimates, the paper's numbers, the best methods and the verdict.

Tables, plots and the HTML page all show these numbers, so that they agree.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from cora_cli.evaluation.metrics import NAMES
from cora_cli.experiments.paper import paper_row
from cora_cli.reporting.learning_rate_sweep import VALIDATION, RatesByMethod, choose_learning_rates, rate_obstacle, rates_of
from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.outcomes import BETTER, decide
from cora_cli.reporting.report_rows import Experiment, Row
from cora_cli.reporting.results import Collection, Result
from cora_cli.reporting.statistics import Estimate, MethodResults, compare, compute_estimates, group_methods, higher_is_better
from cora_cli.reporting.verdict import Verdict, judge


@dataclasses.dataclass(frozen=True, eq=False)
class Line:
    """One method of a group with its estimates and the paper's numbers, by measure. The main table shows the `chosen` lines."""

    method: MethodResults
    estimates: dict[str, Estimate]
    paper: dict[str, float]
    chosen: bool

    @property
    def title(self) -> str:
        """The name of the row in the paper, or the name of the method."""
        return self.method.first.row.printed or self.method.name


@dataclasses.dataclass(frozen=True)
class Best:
    """The best chosen line of a measure: its index among them, the largest corrected p of its tests against the others (None if some test
    has none), and whether it was shown to be better than each of them, by the rule of the verdict.
    """

    place: int
    p_holm: float | None
    supported: bool


@dataclasses.dataclass(frozen=True)
class Group:
    """Methods with the same data and evaluation.

    `measures` are all measures that any of them has, the held-out loss first. `selected_by` names the loss that chose among learning
    rates, or is None without a sweep. `rates` has the rates of all sweeps, and `sweeps` those that the grid made before its
    confirming seeds, as `records.PlannedSweep`. `diverged` are the rows whose training did.
    """

    name: str
    lines: tuple[Line, ...]
    measures: tuple[str, ...]
    best: dict[str, Best]
    selected_by: str | None
    verdict: Verdict
    rates: RatesByMethod
    sweeps: tuple[Mapping[str, Any], ...] = ()
    diverged: tuple[Row, ...] = ()

    @property
    def chosen(self) -> tuple[Line, ...]:
        """The lines of the main table."""
        return tuple(line for line in self.lines if line.chosen)

    @property
    def shown(self) -> tuple[Result, ...]:
        """The rows behind the main table."""
        return tuple(result for line in self.chosen for result in line.method.results)

    @property
    def results(self) -> tuple[Result, ...]:
        """Every finished row of the group."""
        return tuple(result for line in self.lines for result in line.method.results)


@dataclasses.dataclass(frozen=True)
class Summary:
    """One experiment: its groups, and the collection from which they were computed."""

    collection: Collection
    groups: tuple[Group, ...]


def summarise(collection: Collection) -> Summary:
    """The summary of one experiment."""
    names = dict.fromkeys(row.group for row in collection.experiment.rows)
    groups = []
    for name in names:
        results = [result for result in collection.results if result.row.group == name]
        if results:
            diverged = [row for row in collection.diverged if row.group == name]
            groups.append(_summarise_group(name, results, diverged, collection.experiment))
    return Summary(collection, tuple(groups))


def _summarise_group(name: str, results: Sequence[Result], diverged: Sequence[Row], experiment: Experiment) -> Group:
    measures = tuple(m for m in (LOSS, *NAMES) if any(m in result.measures for result in results))
    methods = group_methods(results)
    compute_estimates(methods, measures)
    chosen, selected_by = choose_learning_rates(methods, diverged)
    lines = tuple(
        Line(
            method,
            {m: estimate for m in measures if (estimate := method.estimate(m))},
            paper_row(experiment.paper_table, method.first.row.printed),
            any(method is one for one in chosen),
        )
        for method in methods
    )
    sweeps = tuple(swept for swept in experiment.sweeps if swept["method"][0] == name)
    rates = rates_of(methods, sweeps, diverged)
    best = best_methods(chosen, measures, rates, experiment.looks)
    verdict = judge(chosen, measures, rates, experiment.margin, experiment.looks, diverged)
    by = VALIDATION if sweeps else selected_by
    return Group(name, lines, measures, best, by, verdict, rates, sweeps, tuple(diverged))


def best_methods(
    methods: Sequence[MethodResults], names: Sequence[str], rates: RatesByMethod | None = None, looks: int | None = None
) -> dict[str, Best]:
    """The best method of each measure, tested against every other method, Holm-corrected over all measures together.

    Measures of fewer than two methods are left out. `rates` has the learning rates of the sweeps (default: those of `methods`).
    """
    rates = rates_of(methods) if rates is None else rates
    pairs: list[tuple[str, int, MethodResults]] = []
    places: dict[str, int] = {}
    for name in names:
        estimates = {index: estimate for index, method in enumerate(methods) if (estimate := method.estimate(name))}
        if len(estimates) > 1:
            sign = 1 if higher_is_better(name) else -1
            places[name] = max((sign * estimate.value, -index, index) for index, estimate in estimates.items())[-1]
            pairs += [(name, places[name], methods[index]) for index in estimates if index != places[name]]
    planned = []
    for name, place, other in pairs:
        found = compare(methods[place], other, name)
        if found is not None:
            planned.append((name, found, None, rate_obstacle(methods[place], other, rates)))
    tests = decide(planned, looks)
    best = {}
    for name, place in places.items():
        own = [test for test in tests if test.measure == name]
        known = [test.p_holm for test in own if test.p_holm is not None]
        largest = max(known) if len(known) == len(own) else None
        best[name] = Best(place, largest, all(test.outcome == BETTER for test in own))
    return best
