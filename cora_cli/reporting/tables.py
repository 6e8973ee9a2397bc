"""Builds the tables of a report: scores, costs, learning-rate sweep and tests, each with its `notes`.

`render` writes them in each format.
"""

from collections.abc import Sequence

from cora_cli.experiments.paper import paper_tables
from cora_cli.planning.page import size_text
from cora_cli.render.table import Cell, Table
from cora_cli.reporting.comparison import digits, title
from cora_cli.reporting.notes import cell_note, lowest_loss, machine_notes, obstacle_notes, rate_of, score_notes
from cora_cli.reporting.outcomes import Test
from cora_cli.reporting.statistics import EXAMPLES, LEVEL, SEEDS, Estimate
from cora_cli.reporting.summary import Group, Line


def scores_table(group: Group, paper_table: str | None) -> Table:
    """The main table: held-out loss and metrics of each method at its chosen learning rate."""
    lines = group.chosen
    rows = [
        (*_names(line, lines), *(_score(group, line, place, measure) for measure in group.measures))
        for place, line in enumerate(lines)
    ]
    # The columns of tables 5 and 6 are a judge's, and stand in the section on it.
    printed = paper_tables()[paper_table] if paper_table else None
    caption = f" – {printed['caption']}" if printed and not set(group.measures).isdisjoint(printed["columns"]) else ""
    headers = (*_name_headers(lines), *(title(measure) for measure in group.measures))
    return Table(f"{group.name}{caption}", headers, tuple(rows), tuple(score_notes(group)))


def costs_table(group: Group) -> Table:
    """The cost of each method: rank, number of models, parameters, size, speed and memory."""
    lines = group.chosen
    rows = []
    for line in lines:
        method, row, first = line.method, line.method.first.row, line.method.first
        rates = [rate for result in method.results if (rate := result.tokens_per_second) is not None]
        memory = [peak for result in method.results if (peak := result.peak_memory_bytes) is not None]
        rows.append(
            (
                *_names(line, lines),
                Cell(_number(row.rank)),
                Cell(_number(row.n_models)),
                Cell(_number(first.trained)),
                Cell(_bytes(first.adapter_bytes)),
                Cell(f"{sum(rates) / len(rates):,.0f}" if rates else "–"),
                Cell(_bytes(max(memory) if memory else None)),
                Cell(", ".join(map(str, method.seeds)) if row.run is not None or row.members else "–"),
            )
        )
    headers = ("rank", "n models", "trained parameters", "adapter size", "tokens/s", "peak memory", "seeds")
    notes = (
        "n models: number of models behind the basis, 0 for the base model alone. adapter size: weights on disk (mode full: the complete model). "
        "tokens/s: training speed including prompt tokens, mean over seeds; other load on the machine lowers it. peak memory: of the training "
        "process, maximum over seeds.",
        *machine_notes(lines),
    )
    return Table(f"{group.name} – cost of each method", (*_name_headers(lines), *headers), tuple(rows), notes)


def verdict_table(group: Group) -> Table:
    """All tests behind the verdict; below each comparison with LoRA stands that of the random control."""
    rows = []
    for comparison in group.verdict.comparisons:
        lead = "control: " if comparison.control else ""
        for test in comparison.tests:
            found, places = test.found, digits(test.measure)
            star = "*" if found.kind == EXAMPLES else ""
            difference = Cell(f"{found.difference:+.{places}f} –")
            if found.ci95 is not None:
                low, high = found.ci95
                difference = Cell(f"{found.difference:+.{places}f}", f"[{low:+.{places}f}, {high:+.{places}f}]{star}")
            seeds = "/".join("–" if count is None else str(count) for count in dict.fromkeys(found.seeds))
            rows.append(
                (
                    Cell(f"{lead}{comparison.one.name} minus {comparison.other.name}"),
                    Cell(title(test.measure)),
                    difference,
                    Cell("–" if test.margin is None else f"± {test.margin:.{places + 1}f}"),
                    p_value_cell(test.p_holm),
                    Cell(seeds),
                    Cell(test.outcome),
                    Cell(_would_decide(test)),
                )
            )
    headers = ("comparison", "measure", "difference", "margin", "p (Holm)", "seeds", "outcome", "would decide")
    notes = [group.verdict.rule]
    tests = [test for comparison in group.verdict.comparisons for test in comparison.tests]
    if any(test.found.kind == EXAMPLES and test.found.ci95 for test in tests):
        notes.append("* A side has one seed: the interval is over records only and excludes the spread over seeds.")
    if any(test.margin is not None and round(test.margin, digits(test.measure) + 1) == 0 for test in tests):
        notes.append(
            "A margin that rounds to zero, such as a share of next to no gain, is too small for anything to be shown equivalent."
        )
    notes += obstacle_notes(group.verdict.comparisons)
    return Table(f"{group.name} – the tests behind the verdict", headers, tuple(rows), tuple(notes))


def p_value_cell(p_holm: float | None) -> Cell:
    """A corrected p-value with three decimals, or a dash; one below the level is never rounded up to it."""
    if p_holm is None:
        return Cell()
    text = "< 0.001" if p_holm < 0.001 else f"{p_holm:.3f}"
    return Cell(f"< {LEVEL:.3f}" if p_holm < LEVEL and text == f"{LEVEL:.3f}" else text)


def _would_decide(test: Test) -> str:
    ways = [
        f"{count:,} more {what}{'' if count == 1 else 's'}"
        for count, what in ((test.more_seeds, "seed"), (test.more_records, "record"))
        if count is not None
    ]
    return " or ".join(ways) or "–"


def sweep_table(group: Group) -> Table:
    """Every method at every learning rate."""
    if group.sweeps:
        return _staged_sweep_table(group)
    rows = [
        (
            *_names(line, group.lines),
            Cell(rate_of(line)),
            Cell("yes" if line.chosen else "no"),
            *(_score(group, line, None, measure) for measure in group.measures),
        )
        for line in group.lines
    ]
    headers = (*_name_headers(group.lines), "learning rate", "chosen", *(title(measure) for measure in group.measures))
    return Table(
        f"{group.name} – all learning rates",
        headers,
        tuple(rows),
        (f"chosen: the learning rate of the method with the {lowest_loss(group)}, mean over seeds. {cell_note(group.lines)}",),
    )


def _staged_sweep_table(group: Group) -> Table:
    """The sweeps before the confirming seeds: the validation loss of each rate at each step at which rates were dropped."""
    steps = sorted({int(step) for swept in group.sweeps for losses in swept["losses"].values() for step in losses})
    rows = []
    for swept in group.sweeps:
        label, printed, rank, n_models = swept["method"][1], swept["method"][2], swept["method"][4], swept["method"][5]
        name = printed or " ".join(
            [label, *([f"r={rank}"] if rank is not None else []), *([f"n={n_models}"] if n_models is not None else [])]
        )
        for rate, losses in swept["losses"].items():
            cells = [
                Cell("diverged" if losses[str(step)] is None else f"{losses[str(step)]:.4f}")
                if str(step) in losses
                else Cell("–")
                for step in steps
            ]
            end = "chosen" if float(rate) == swept["chosen"] else "dropped" if rate in swept["dropped"] else ""
            added = " (added)" if swept["added"] is not None and float(rate) == swept["added"] else ""
            rows.append((Cell(str(name)), Cell(f"{float(rate):g}{added}"), *cells, Cell(end)))
    return Table(
        f"{group.name} – learning-rate sweep",
        ("method", "learning rate", *(f"step {step}" for step in steps), "outcome"),
        tuple(rows),
        (
            "Validation loss in nats per response token, mean over the sweep's seeds, at each step at which rates were compared; the "
            "worse half was dropped there, except rates close to the best one and, before the last step, the best two. –: the rate was not trained so far. added: the best planned "
            "rate was at the edge of the sweep.",
        ),
    )


def _names(line: Line, lines: Sequence[Line]) -> tuple[Cell, ...]:
    if any(other.method.first.row.printed for other in lines):
        return Cell(line.title), Cell(line.method.name)
    return (Cell(line.title),)


def _name_headers(lines: Sequence[Line]) -> tuple[str, ...]:
    return ("row", "method") if any(line.method.first.row.printed for line in lines) else ("method",)


def _score(group: Group, line: Line, place: int | None, measure: str) -> Cell:
    estimate, best = line.estimates.get(measure), group.best.get(measure)
    bold = best is not None and best.supported and best.place == place
    paper = line.paper.get(measure) if place is not None else None
    return _estimated(estimate, digits(measure), paper, bold)


def _estimated(estimate: Estimate | None, places: int, published: float | None = None, bold: bool = False) -> Cell:
    """`0.393 ± 0.012` over seeds and records, `0.393 [0.381, 0.405]` over records only, a value and a dash if it has no interval, or a dash;
    with the published number, if any.
    """
    if estimate is None:
        return Cell(published=published, bold=bold)
    if estimate.ci95 is None:
        return Cell(f"{estimate.value:.{places}f} –", published=published, bold=bold)
    interval = (
        f"± {estimate.half_width:.{places}f}"
        if estimate.kind == SEEDS
        else f"[{estimate.low:.{places}f}, {estimate.high:.{places}f}]"
    )
    return Cell(f"{estimate.value:.{places}f}", interval, published, bold)


def _number(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _bytes(value: int | None) -> str:
    return "–" if value is None else size_text(value)
