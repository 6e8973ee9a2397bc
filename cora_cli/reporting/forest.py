"""Draws the forest plot that opens a report: every difference behind the verdict with its interval, margin and word.

The numbers are those of the table of tests.
"""

import math
from typing import Any

from cora_cli.render.canvas import INK, PALETTE, Figure, render
from cora_cli.reporting.comparison import BASE, Comparison, title
from cora_cli.reporting.outcomes import BETTER, EQUIVALENT, UNDECIDED, WORSE, Test
from cora_cli.reporting.statistics import EXAMPLES, higher_is_better
from cora_cli.reporting.summary import Group

FOREST = "forest"
"""The end of the names of forest plots, which stand above the verdict."""
_COLORS = {BETTER: PALETTE[2], WORSE: PALETTE[1], EQUIVALENT: PALETTE[0], UNDECIDED: "#777777"}
_COLUMNS = 2
_LONGEST = 46
MOST_SHOWN = 60
"""The most comparisons, or methods, that one plot can show legibly."""


def draw_forest(group: Group, prefix: str) -> Figure:
    """One panel per measure, one row per comparison; the random control's row is indented below each comparison with LoRA."""
    comparisons = [comparison for comparison in group.verdict.comparisons if comparison.role != BASE]
    comparisons = comparisons or list(group.verdict.comparisons)
    left_out = len(comparisons) - MOST_SHOWN
    comparisons = comparisons[:MOST_SHOWN]
    measures = [measure for measure in group.measures if any(comparison.test(measure) for comparison in comparisons)]
    columns = min(_COLUMNS, len(measures))
    rows = math.ceil(len(measures) / columns)
    dashed = any(test.found.kind == EXAMPLES for comparison in comparisons for test in comparison.tests)
    return render(
        f"{prefix}{FOREST}",
        f"{group.name}: the differences behind the verdict",
        "Points: first method minus second, with 95 % intervals over seeds and records, not corrected for multiple tests. "
        + ("Dashed: one seed, so over records only. " if dashed else "")
        + "Grey band: the margin of equivalence. Indented rows: the random control compared with the same LoRA. An interval much wider than the "
        "others ends in an arrow at the edge of the panel. The word is the outcome by the rule of the table of tests."
        + (
            f" The plot shows the first {MOST_SHOWN} comparisons; the table of tests has {left_out} more."
            if left_out > 0
            else ""
        ),
        lambda figure: _forest(figure, comparisons, measures, rows, columns),
        (9.0, rows * (0.27 * len(comparisons) + 0.7)),
    )


def _forest(figure: Any, comparisons: list[Comparison], measures: list[str], rows: int, columns: int) -> None:
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for place, ax in enumerate(axes.flat):
        if place >= len(measures):
            ax.axis("off")
            continue
        measure = measures[place]
        tests = [comparison.test(measure) for comparison in comparisons]
        low, high = _limits([test for test in tests if test])
        for y, test in enumerate(tests):
            if test:
                _row(ax, y, test, low, high)
        ax.axvline(0, color=INK, linewidth=0.8)
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0)
        ax.set(xlim=(low, high), ylim=(len(comparisons) - 0.5, -0.5))
        ax.set_title(f"{title(measure)} ({'higher' if higher_is_better(measure) else 'lower'} is better)", loc="left")
        ax.locator_params(axis="x", nbins=5)
    axes[0, 0].set_yticks(range(len(comparisons)), [_label(comparison) for comparison in comparisons])
    for ax in axes[:, 0]:
        # Left-aligned labels show the indentation.
        longest = max(len(_label(comparison)) for comparison in comparisons)
        for label in ax.get_yticklabels():
            label.set(horizontalalignment="left", fontsize=7.5)
        ax.tick_params(axis="y", pad=4.3 * longest)


def _row(ax: Any, y: int, test: Test, low: float, high: float) -> None:
    found, color = test.found, _COLORS[test.outcome]
    if test.margin is not None:
        ax.fill_betweenx([y - 0.5, y + 0.5], -test.margin, test.margin, color="#999999", alpha=0.25, linewidth=0)
    if found.ci95:
        left, right = max(found.ci95[0], low), min(found.ci95[1], high)
        ax.plot([left, right], [y, y], color=color, linewidth=1.5, linestyle="--" if found.kind == EXAMPLES else "-")
        for end, cut, arrow in ((left, found.ci95[0] < low, "<"), (right, found.ci95[1] > high, ">")):
            if cut:
                ax.plot(end, y, arrow, color=color, markersize=4, clip_on=False)
    ax.plot(found.difference, y, "o", color=color, markersize=4.5)
    ax.annotate(
        test.outcome,
        (1, y),
        (5, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="center",
        fontsize=7.5,
        color=color,
        annotation_clip=False,
    )


def _limits(tests: list[Test]) -> tuple[float, float]:
    """Limits that show every difference and margin, and intervals up to three times the median length on each side."""
    reaches = sorted(max(abs(end) for end in test.found.ci95) for test in tests if test.found.ci95)
    most = max(max(abs(test.found.difference), test.margin or 0.0) for test in tests)
    middle = reaches[len(reaches) // 2] if reaches else 0.0
    reach = 1.1 * max(most, min(reaches[-1] if reaches else 0.0, 3 * middle)) or 1.0
    return -reach, reach


def _label(comparison: Comparison) -> str:
    text = f"{comparison.one.name} − {comparison.other.name}"
    text = f"    ↳ {text}" if comparison.control else text
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
