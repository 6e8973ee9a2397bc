"""Tells `cora ablate` which methods of a grid need another confirming seed."""

from collections.abc import Collection
from pathlib import Path

from cora_cli.reporting.collect import collect
from cora_cli.reporting.outcomes import UNDECIDED
from cora_cli.reporting.report_rows import read_plan
from cora_cli.reporting.summary import summarise


def seeds_wanted(out: Path, measures: Collection[str]) -> dict[tuple[object, ...], int]:
    """How many seeds each method of the grid in `out` needs for its next verdict, by (data set, label, printed name, mode, rank, models).

    A method that is undecided in one of the `measures` in some comparison needs one more than that comparison has; where the learning
    rates are an obstacle, no seed would decide. Methods without comparisons are left out.
    """
    wanted: dict[tuple[object, ...], int] = {}
    for group in summarise(collect(read_plan(out))).groups:
        for comparison in group.verdict.comparisons:
            tests = [test for name in measures if (test := comparison.test(name)) is not None]
            counts = [count for test in tests if (count := test.found.fewest_seeds) is not None]
            if not counts:
                continue
            open_still = any(test.outcome == UNDECIDED and not test.of_rates for test in tests)
            for side in (comparison.one, comparison.other):
                key = side.planned_as
                wanted[key] = max(wanted.get(key, 0), min(counts) + open_still)
    return wanted
