"""Summarises a collection, one summary per group: methods, estimates, the paper's numbers, the best methods and the verdict.

Tables, plots and the HTML page all show these numbers, so that they agree.
"""

import dataclasses
from collections.abc import Sequence

from cora_cli.evaluation.metrics import NAMES
from cora_cli.experiments.paper import paper_row
from cora_cli.reporting.collect import Collection, Result
from cora_cli.reporting.learning_rate_sweep import choose_learning_rates
from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.statistics import LEVEL, Estimate, MethodResults, best_methods, group_methods
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
    """The best chosen line of a measure: its index among them, the largest corrected p of its tests against the others, and whether
    it was better than each of them at every seed.
    """

    place: int
    p_holm: float
    seeds_agree: bool

    @property
    def supported(self) -> bool:
        """Whether it was shown to be better than every other method."""
        return self.p_holm < LEVEL and self.seeds_agree


@dataclasses.dataclass(frozen=True)
class Group:
    """Methods with the same data and evaluation.

    `measures` are all measures that any of them has, the held-out loss first. `selected_by` names the loss that chose among learning
    rates, or is None without a sweep.
    """

    name: str
    lines: tuple[Line, ...]
    measures: tuple[str, ...]
    best: dict[str, Best]
    selected_by: str | None
    verdict: Verdict

    @property
    def chosen(self) -> tuple[Line, ...]:
        """The lines of the main table."""
        return tuple(line for line in self.lines if line.chosen)

    @property
    def results(self) -> tuple[Result, ...]:
        """Every finished row of the group."""
        return tuple(result for line in self.lines for result in line.method.results)


@dataclasses.dataclass(frozen=True)
class Summary:
    """One experiment: its groups, and the collection from which they were computed."""

    collection: Collection
    groups: tuple[Group, ...]


def summarise(collection: Collection, seed: int = 0) -> Summary:
    """The summary of one experiment; `seed` draws the resamples of all tests."""
    names = dict.fromkeys(row.group for row in collection.experiment.rows)
    groups = []
    for name in names:
        results = [result for result in collection.results if result.row.group == name]
        if results:
            groups.append(_summarise_group(name, results, collection.experiment.paper_table, seed))
    return Summary(collection, tuple(groups))


def _summarise_group(name: str, results: Sequence[Result], paper_table: str | None, seed: int) -> Group:
    measures = tuple(m for m in (LOSS, *NAMES) if any(m in result.measures for result in results))
    methods = group_methods(results)
    chosen, selected_by = choose_learning_rates(methods)
    lines = tuple(
        Line(
            method,
            {m: estimate for m in measures if (estimate := method.estimate(m))},
            paper_row(paper_table, method.first.row.printed),
            any(method is one for one in chosen),
        )
        for method in methods
    )
    best = {measure: Best(*found) for measure, found in best_methods(chosen, measures, seed).items()}
    return Group(name, lines, measures, best, selected_by, judge(chosen, measures, seed))
