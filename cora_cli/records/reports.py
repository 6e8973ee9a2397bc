"""The parts of a `report.json` that other commands use."""

from typing import NotRequired, TypedDict


class ReportedMeasure(TypedDict):
    """One measure of a line; `by_seed` has its value at each seed."""

    by_seed: NotRequired[dict[str, float]]


class ReportedLine(TypedDict):
    """A line of a report's table; `results` has the hash of what each of its runs trained, None for the base model. The verdict is on the lines that
    are `chosen`."""

    method: str
    chosen: NotRequired[bool]
    results: NotRequired[list[str | None]]
    measures: NotRequired[dict[str, ReportedMeasure]]


class ReportedComparison(TypedDict):
    """Two methods and the sentence about them."""

    one: str
    other: str
    sentence: str


class ReportedVerdict(TypedDict):
    """The verdict of a group."""

    headline: str
    comparisons: list[ReportedComparison]


class ReportedGroup(TypedDict):
    """Runs that were compared with each other."""

    lines: list[ReportedLine]
    verdict: ReportedVerdict


class ReportedExperiment(TypedDict):
    """An experiment of a report."""

    groups: list[ReportedGroup]
    conditions: NotRequired[list[str]]


class Report(TypedDict):
    """`report.json`."""

    experiments: list[ReportedExperiment]
