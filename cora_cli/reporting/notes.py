"""The notes under the tables of a report: what a cell says, how the rows differ apart from their methods, and where a number says less than it seems to."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cora_cli.evaluation.metrics import build_metrics, scales
from cora_cli.evaluation.shortcomings import KINDS
from cora_cli.experiments.paper import paper
from cora_cli.methods.registry import METHODS
from cora_cli.reporting.comparison import Comparison, digits, title
from cora_cli.reporting.learning_rate_sweep import AT_EDGE, UNSWEPT, VALIDATION, at_edge, deciding_seeds, eligible
from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.report_rows import clean
from cora_cli.reporting.results import Result
from cora_cli.reporting.statistics import EXAMPLES, SEEDS, MethodResults
from cora_cli.reporting.summary import Group, Line
from cora_cli.reporting.training_conditions import differing_conditions

_OF_ANSWERS = ("template", "template_date", "decoding", "max_new_tokens", "end_tokens", "dtype", "own_code")
"""The settings of an evaluation by which the answers of one model differ beyond rounding."""
_OF_SPEED = {"processes": 1, "shard": "none", "fast_path": "none", "tokens_per_row": "none"}
"""What a run records of its machine, apart from device and threads, that decides about its speed and memory, with its value where it is not recorded."""


def machine_notes(lines: Sequence[Line]) -> list[str]:
    """A sentence where speed and memory are of different machines, or of other ways to compute the same."""
    found: dict[str, dict[str, None]] = {}
    trained = [result.record for line in lines for result in line.method.results if result.record]
    for record in trained:
        # The tokens/s of a run that was resumed elsewhere are over all machines, its memory is that of the last one.
        for hardware in (*record.get("hardware_before", ()), record["hardware"]):
            # On a GPU the reason is its name.
            device = hardware["device_reason"] if hardware["device"].startswith("cuda") else hardware["device"]
            others = {name: hardware.get(name, neutral) for name, neutral in _OF_SPEED.items()}
            for name, value in {"device": device, "threads": hardware["threads"], **others, **_passes(record)}.items():
                found.setdefault(name.replace("_", " "), {})[clean(str(value))] = None
    differing = [f"{name} ({', '.join(values)})" for name, values in found.items() if len(values) > 1]
    return (
        [
            f"Not all rows were trained on one machine or in one way, from which differences in tokens/s and memory may come: {'; '.join(differing)}."
        ]
        if differing
        else []
    )


def _passes(record: Mapping[str, Any]) -> dict[str, str]:
    """How a training passed its examples through the model: how many at once, in what kind of batch, and whether activations were computed twice."""
    settings, attention = record["fingerprint"]["settings"], record.get("attention", {})
    known = {
        "gradient_checkpointing": "on" if settings.get("gradient_checkpointing") else "off",
        "batch_size": settings.get("batch_size"),
        "batches": attention.get("batches"),
    }
    return {name: str(value) for name, value in known.items() if value is not None}


def obstacle_notes(comparisons: Sequence[Comparison]) -> list[str]:
    """What stands in the way of a decision, or of a conclusion about the information in B, and in which comparisons."""
    unswept = [_pair(c) for c in comparisons if any(test.of_rates == UNSWEPT for test in c.tests)]
    at_edge = [
        f"{_pair(c)} (that{test.of_rates.removeprefix(AT_EDGE)})"
        for c in comparisons
        for test in c.tests
        if test.of_rates.startswith(AT_EDGE)
    ]
    notes = {
        "Learning rates not swept alike, so neither better, worse nor equivalent": unswept,
        "Best learning rate at the edge of the sweep, so that a better one may lie outside it, and neither better, worse nor equivalent": at_edge,
        "No random control of this form, so no conclusion about the information in B": [
            _pair(c) for c in comparisons if c.uncontrolled
        ],
    }
    return [f"{said}: {'; '.join(dict.fromkeys(pairs))}." for said, pairs in notes.items() if pairs]


def _pair(comparison: Comparison) -> str:
    return f"{comparison.one.name} and {comparison.other.name}"


def score_notes(group: Group) -> list[str]:
    """The notes under the main table of a group."""
    lines = group.chosen
    notes = [cell_note(lines), *_lopsided_notes(group)]
    notes += _paper_notes([line for line in lines if not line.paper.keys().isdisjoint(group.measures)])
    supported = [measure for measure in group.measures if measure in group.best and group.best[measure].supported]
    meaning = "better than all others by the rule of the verdict, Holm-corrected over the table"
    if supported:
        notes.append(f"Bold: the best value of its column, if it is {meaning}.")
    elif group.best:
        notes.append(f"Nothing is in bold: no column has a value that is {meaning}.")
    if left_out := dict.fromkeys(name for result in group.shown for name in result.generation.get("left_out", ())):
        notes.append(
            f"Measured, but left out by --metrics, so that p-values are not corrected over them: {', '.join(left_out)}."
        )
    notes += _repetition_notes(group) + _training_notes(group) + _loss_notes(group)
    return notes + _answer_notes(group) + _unscorable_notes(group) + _divergence_notes(group) + _selection_notes(group)


def _paper_notes(compared: Sequence[Line]) -> list[str]:
    """A sentence on the paper's numbers next to those of `compared`, and on what these are of: a grid file may name another model, other data or ranks."""
    if not compared:
        return []
    source, rows = paper(), [line.method.first.row for line in compared]
    model, data = (" / ".join(dict.fromkeys(names)) for names in ([row.model for row in rows], [row.dataset for row in rows]))
    ranks = ", ".join(str(rank) for rank in dict.fromkeys(row.rank for row in rows) if rank is not None)
    return [
        f"In parentheses: the number published in the paper ({source['source']}, {source['model']}, one seed, no interval). "
        f"The numbers here are of {model} on {data}{f', rank {ranks}' if ranks else ''}.",
        *_metrics_unlike_the_papers(compared),
    ]


def _metrics_unlike_the_papers(compared: Sequence[Line]) -> list[str]:
    """A sentence on the metrics of `compared` that stand next to numbers of the paper on another scale, or most likely of another implementation."""
    measured = {name: line.method.with_measure(name) for line in compared for name in line.paper if name in line.estimates}
    signatures = {name: results[0].measures[name].signature for name, results in measured.items()}
    # The two variants have the same SacreBLEU.
    own = [name for name, said in signatures.items() if name.startswith(("rouge", "meteor")) and "variant:" not in said]
    found = [f"{', '.join(own)} as cora computes them by default (--metric-variant hf-evaluate is closer)"] if own else []
    if "|encoder:builtin:" in signatures.get("bertscore_f1", ""):
        found.append("bertscore_f1 on a small encoder (MiniLM-L6), so on another scale")
    return [f"Measured otherwise than most likely in the paper: {'; '.join(found)}."] if found else []


def _lopsided_notes(group: Group) -> list[str]:
    """A sentence with the ends of intervals that a half length misrepresents, since they reach more than twice as far to one side."""
    found = []
    for line, measure in itertools.product(group.chosen, group.measures):
        estimate, places = line.estimates.get(measure), digits(measure)
        if estimate is None or estimate.kind != SEEDS or estimate.ci95 is None:
            continue
        near, far = sorted((estimate.value - estimate.low, estimate.high - estimate.value))
        if far > 2 * near:
            found.append(f"{line.title} {title(measure)} [{estimate.low:.{places}f}, {estimate.high:.{places}f}]")
    return (
        [f"Intervals that reach more than twice as far to one side, which ± does not show: {'; '.join(found)}."]
        if found
        else []
    )


def _repetition_notes(group: Group) -> list[str]:
    """A sentence where records with one prompt were measured as if they were independent."""
    results = group.shown
    measured = [result.record["data"] for result in results if result.record and LOSS in result.measures]
    answered = [result.generation for result in results if "answers" in result.generation]
    counts = {
        "held-out": [(data.get("repeated_held_out", 0), data["test"]["records"]) for data in measured],
        "answered": [(answers.get("repeated_prompts", 0), answers["answers"]) for answers in answered],
    }
    most = {what: max(found, default=(0, 0)) for what, found in counts.items()}
    listed = [f"{repeated} of {records} {what} ones" for what, (repeated, records) in most.items() if repeated]
    said = "Records with the prompt of an earlier one, which intervals and tests take as independent, so that intervals are too narrow"
    return [f"{said}: {', '.join(listed)}."] if listed else []


def _training_notes(group: Group) -> list[str]:
    """A sentence where the rows of a table differ by more than their methods."""
    differing = differing_conditions(group.shown)
    listed = "; ".join(f"{name} ({', '.join(values)})" for name, values in differing.items())
    return [f"Not all rows were trained alike, from which differences between them may come: {listed}."] if listed else []


def _loss_notes(group: Group) -> list[str]:
    """Sentences where the held-out losses of a table are of trained prompts, or of different ones: of other templates, or cut to other lengths."""
    results = [result for line in group.chosen for result in line.method.results if result.record and LOSS in result.measures]
    asked = [{**result.record["fingerprint"]["settings"], **result.record["data"]} for result in results]
    # A maximum length decides nothing where no prompt reaches it.
    cut = any(result.record["data"]["test"]["truncated"] for result in results)
    names = ("template", "template_date", *(("max_length",) if cut else ()))
    found = ((name, dict.fromkeys(clean(str(one[name])) for one in asked if one.get(name) is not None)) for name in names)
    differing = [f"{name} ({', '.join(values)})" for name, values in found if len(values) > 1]
    known = []
    for line in group.chosen:
        measured = [result.record["data"] for result in line.method.results if result.record and LOSS in result.measures]
        most, of = max(((data.get("held_out_trained_on", 0), data["test"]["records"]) for data in measured), default=(0, 0))
        known += [f"{line.title} {most} of {of}"] if most else []
    notes = {
        "Held-out records with prompts that the models behind a method were trained on, so that its held-out loss says little about new ones": known,
        "The held-out losses are of different prompts, from which differences between rows may come": differing,
    }
    return [f"{said}: {'; '.join(which)}." for said, which in notes.items() if which]


def _answer_notes(group: Group) -> list[str]:
    """Sentences on rows whose answers cannot be compared with those of others: of trained prompts, or generated with other settings."""
    results = group.shown
    notes = [
        f"{result.row.name}: {known} of its prompts were trained on, so its scores say little about new ones."
        for result in results
        if (known := result.generation.get("prompts_trained_on"))
    ]
    of_runs = [result.generation.get("dataset") for result in results if result.row.run is not None]
    others = dict.fromkeys(clean(dataset) for dataset in of_runs if dataset)
    if others:
        lost = ", and the held-out loss of those that the runs held out" if LOSS in group.measures else ""
        notes.append(f"The scores are of the records of {', '.join(others)}{lost}.")
    otherwise = [f"{result.row.name} ({', '.join(asked)})" for result in results if (asked := result.asked_otherwise)]
    if otherwise:
        notes.append(f"Asked otherwise than the training, and than the held-out loss, was: {clean('; '.join(otherwise))}.")
    differing = [f"{name} ({', '.join(values)})" for name, values in _unlike_answers(results).items()]
    prompts = {known for result in results if (known := result.generation.get("prompts_sha256"))}
    if len(prompts) > 1 and not any(name.startswith("template") for name in differing):
        notes.append(
            "The records have equal references, but not all rows were asked the same prompts, so their scores are of different tasks."
        )
    if differing:
        mixed = [line.title for line in group.chosen if _unlike_answers(line.method.results)]
        means = f" The means over seeds mix them: {', '.join(mixed)}." if mixed else ""
        notes.append(
            f"The answers were generated with different settings, from which differences between rows may come: {'; '.join(differing)}.{means}"
        )
    return notes + _rounding_notes(group) + _shortcoming_notes(group)


def _rounding_notes(group: Group) -> list[str]:
    """A sentence on the rows whose answers are of merged weights that lost much of what was trained, which the held-out loss has in full."""
    found = []
    for line in group.chosen:
        lost = [share for result in line.method.results if (share := result.generation.get("rounded_away")) is not None]
        few = f" in {len(lost)} of {len(line.method.results)} runs" if len(lost) < len(line.method.results) else ""
        found += [f"{line.title} {max(lost):.0%}{few}"] if lost else []
    said = "Answers of merged weights, where rounding lost much of the adapter's change, unlike in the held-out loss (--dtype fp32 or --no-merge keeps it)"
    return [f"{said}: {'; '.join(found)}."] if found else []


def _unlike_answers(results: Sequence[Result]) -> dict[str, list[str]]:
    """By which settings the answers of `results` were generated differently, with their values."""
    found: dict[str, dict[str, None]] = {}
    for result in results:
        known = {**result.generation.get("settings", {}), **result.generation}
        # Of earlier versions: `auto` became one of the others.
        own = {name: clean(str(value)) for name in _OF_ANSWERS if (value := known.get(name)) not in (None, "auto")}
        if (draws := _draws(result)) is not None:
            own["draws of the weights"] = draws
        for name, value in own.items():
            found.setdefault(name, {})[value] = None
    return {name: list(found[name]) for name in (*_OF_ANSWERS, "draws of the weights") if len(found.get(name, ())) > 1}


def _draws(result: Result) -> str | None:
    """The draws of a distribution of weights whose probabilities were averaged, 0 where they are those of its mean; None where no distribution is known."""
    settings, mode = result.generation.get("settings", {}), result.row.mode
    drawn = "laplace" in result.record or (mode in METHODS and METHODS[mode].learns_distribution)
    if not settings or not (drawn or settings.get("draws")):
        return None
    return "/".join(dict.fromkeys(map(str, settings.get("draws") or [0])))


def _shortcoming_notes(group: Group) -> list[str]:
    """One sentence for each kind of answers whose scores say less than they seem to, with their number in each row."""
    notes = []
    for kind, words in KINDS.items():
        found = []
        for line in group.chosen:
            answered = [result for result in line.method.results if "shortcomings" in result.generation]
            if count := sum(result.generation["shortcomings"].get(kind, 0) for result in answered):
                found.append(f"{line.title} {count} of {sum(result.generation['answers'] for result in answered)}")
        notes += [f"Answers {words}: {'; '.join(found)}."] if found else []
    return notes


def _unscorable_notes(group: Group) -> list[str]:
    """One sentence for each measure with references of which it says nothing."""
    notes = []
    for name, metric in build_metrics(name for name in group.measures if name != LOSS).items():
        found = [result.measures[name] for line in group.chosen for result in line.method.with_measure(name)]
        worst = max(found, key=lambda measure: measure.unscorable, default=None)
        if worst is not None and worst.unscorable:
            notes.append(f"{title(name)}: {worst.unscorable} of {worst.n} references {metric.blind_spot}.")
    return notes


def _divergence_notes(group: Group) -> list[str]:
    """A sentence on the learning rates at which trainings of the shown methods diverged."""
    found: dict[str, None] = {}
    for line in group.chosen:
        rates = Counter(row.learning_rate for row in group.diverged if row.identity == line.method.identity)
        for rate, count in rates.items():
            seeds = f"{count} seed{'s' if count > 1 else ''}"
            shown = "shown without them" if rate == line.method.first.row.learning_rate else "tried and not chosen"
            found[f"{line.method.name} {'–' if rate is None else f'{rate:g}'} ({seeds}; {shown})"] = None
    return [f"Learning rates at which trainings diverged: {', '.join(found)}."] if found else []


def lowest_loss(group: Group) -> str:
    """By what the shown learning rates were chosen, in words; one that was not may have a lower loss, over the seeds that survived it."""
    found: dict[tuple[object, ...], list[MethodResults]] = {}
    for line in group.lines:
        found.setdefault(line.method.identity, []).append(line.method)
    fewer = any(len(eligible(rates, group.diverged)) < len(rates) for rates in found.values())
    return f"lowest {group.selected_by}" + (" of those at which no training diverged, where there are any" if fewer else "")


def _selection_notes(group: Group) -> list[str]:
    if not group.selected_by:
        return []
    # A start that takes no step has planned rates like the others, and none of them matters.
    trained = [
        line for line in group.chosen if line.method.first.row.learning_rate is not None and line.method.first.trained != 0
    ]
    rates = "; ".join(f"{line.method.name} {rate_of(line)}" for line in trained)
    caution = (
        "The validation records were used neither for training nor for any number in this table."
        if group.selected_by == VALIDATION
        else "This choice makes the held-out loss, and any measure on the same records, slightly too favourable for the swept methods."
    )
    if group.sweeps:
        notes = [
            f"Learning rates were chosen by the validation loss, with other seeds than those shown: {rates}. The table of the sweep is below."
        ]
        return notes + _edge_notes(group)
    notes = [
        f"Learning-rate sweep: each method is shown at the learning rate with its {lowest_loss(group)} (mean over seeds): {rates}. "
        f"{caution} The table of all learning rates is below."
    ]
    return notes + _seed_notes(group) + _edge_notes(group)


def _seed_notes(group: Group) -> list[str]:
    """A sentence on the methods not all of whose seeds have all learning rates."""
    unlike = []
    for line in group.chosen:
        alike = [other for other in group.lines if other.method.identity == line.method.identity]
        rates = eligible([other.method for other in alike], group.diverged)
        if len({method.seeds for method in rates}) > 1 and [other for other in alike if other.chosen] == [line]:
            seeds = sorted(deciding_seeds(rates, group.selected_by or ""))
            by = (
                f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
                if seeds
                else "different seeds, which favours a rate"
            )
            unlike.append(f"{line.method.name} by {by}")
    said = "Not every learning rate has finished with the same seeds, so the choice is made by those that all rates have"
    return [f"{said}: {'; '.join(unlike)}."] if unlike else []


def _edge_notes(group: Group) -> list[str]:
    edges = [f"{line.method.name} {rate_of(line)}" for line in group.chosen if at_edge(line.method, group.rates)]
    return [f"At the edge of the sweep, so a better learning rate may lie outside it: {'; '.join(edges)}."] if edges else []


def cell_note(lines: Sequence[Line]) -> str:
    """What the values and intervals in the cells of `lines` are, over how many records, and on which scales."""
    estimates = [estimate for line in lines for estimate in line.estimates.values()]
    parts = []
    counts = "/".join(map(str, sorted({e.seeds for e in estimates if e.kind == SEEDS})))
    if counts:
        parts.append(
            f"value ± half the length of its 95 % interval: mean over {counts} seeds, which are crossed with the records"
        )
    if any(e.ci95 is None for e in estimates):
        parts.append("–: no interval can be had, as from a single record or from values that all agree")
    if any(e.kind == EXAMPLES and e.ci95 for e in estimates):
        parts.append(
            "value [low, high]: a single run (or a model that does not depend on the seed) with its 95 % bootstrap interval over "
            "records only, which excludes the spread over seeds"
        )
    measures = {measure for line in lines for measure in line.estimates}
    sizes = {title(m): sorted({line.estimates[m].n for line in lines if m in line.estimates}) for m in measures}
    loss, prompts = sizes.pop("held-out loss", None), sorted({n for found in sizes.values() for n in found})
    counted = [f"n = {'/'.join(map(str, prompts))} prompts"] if prompts else []
    counted += (
        [f"held-out loss in nats per response token over {'/'.join(map(str, loss))} records, lower is better"] if loss else []
    )
    metrics = sorted(measures - {LOSS})
    return f"{'; '.join([*parts, *counted])}." + (f" Metrics: {scales(metrics)}." if metrics else "")


def rate_of(line: Line) -> str:
    """The learning rate of a line, or a dash without one."""
    rate = line.method.first.row.learning_rate
    return "–" if rate is None else f"{rate:g}"
