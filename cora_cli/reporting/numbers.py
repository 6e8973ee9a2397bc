"""Writes reports for other programs: a tidy CSV of all measures, and JSON with the complete report.

JSON: `{"format_version": 1, "experiments": [...]}`. An experiment has `name`, `title`, `paper_table`, `preset`, `conditions`, `methods`
(the paragraphs), `missing` (`row`, `part`, `reason`) and `groups`. A group has `name`, `measures`, `selected_by`, `lines`, `best` and `verdict`:

- a line: `row` (title), `method`, `mode`, `label`, `printed`, `rank`, `n_models`, `learning_rate`, `chosen`, `seeds`, `rows` (names),
  `trained_parameters`, `adapter_bytes`, `tokens_per_second` and `peak_memory_bytes` (a value per seed), `paper` (measure -> number), and
  `measures`: measure -> `value`, `low`, `high`, `kind`, `n`, `seeds`, `by_seed`;
- `best`: measure -> `row`, `p_holm`, `seeds_agree`, `supported`;
- `verdict`: `headline`, `rule`, `comparisons`, each with `one`, `other`, `role`, `sentence` and `tests`: `measure`, `difference`, `ci95`, `p`,
  `p_holm`, `n`, `outcome`, `seeds`, `seeds_agreeing`, `over_seeds` (mean and half-width, or null).

`heldout_loss` is in nats per response token, `sacrebleu` 0-100, the other measures 0-1.
"""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from cora_cli.reporting.methods_section import methods_paragraphs
from cora_cli.reporting.summary import Group, Line, Summary
from cora_cli.reporting.verdict import Verdict

FORMAT_VERSION = 1
COLUMNS = (
    "experiment",
    "group",
    "row",
    "method",
    "mode",
    "rank",
    "n_models",
    "learning_rate",
    "chosen",
    "measure",
    "value",
    "low",
    "high",
    "kind",
    "n",
    "seeds",
    "paper",
    "best",
    "best_p_holm",
)


def to_csv(summaries: Sequence[Summary]) -> str:
    """One line per method, learning rate and measure, in full precision. Costs count as measures, as means over seeds."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for summary in summaries:
        for group in summary.groups:
            for line in group.lines:
                writer.writerows(_csv_rows(summary.collection.experiment.name, group, line))
    return out.getvalue()


def to_json(summaries: Sequence[Summary]) -> str:
    """The complete report as JSON; the module docstring describes the keys."""
    report = {"format_version": FORMAT_VERSION, "experiments": [_experiment(summary) for summary in summaries]}
    return json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _csv_rows(experiment: str, group: Group, line: Line) -> list[dict[str, Any]]:
    row = line.method.first.row
    common = {
        "experiment": experiment,
        "group": group.name,
        "row": line.title,
        "method": line.method.name,
        "mode": row.mode,
        "rank": row.rank,
        "n_models": row.n_models,
        "learning_rate": row.learning_rate,
        "chosen": line.chosen,
    }
    rows = []
    for measure, found in line.estimates.items():
        best = group.best.get(measure)
        is_best = best is not None and line.chosen and group.chosen[best.place] is line
        rows.append(
            {
                **common,
                "measure": measure,
                "value": repr(found.value),
                "low": repr(found.low) if found.has_interval else "",
                "high": repr(found.high) if found.has_interval else "",
                "kind": found.kind,
                "n": found.n,
                "seeds": found.seeds,
                "paper": line.paper.get(measure),
                "best": is_best and best is not None and best.supported,
                "best_p_holm": best.p_holm if is_best and best else None,
            }
        )
    for name, values in _costs(line).items():
        known = [value for value in values if value is not None]
        if known:
            rows.append(
                {**common, "measure": name, "value": repr(sum(known) / len(known)), "kind": "mean", "seeds": len(known)}
            )
    return [{key: _safe(value) for key, value in entry.items()} for entry in rows]


def _safe(value: Any) -> Any:
    """Quote text that a spreadsheet would take for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+@" else value


def _costs(line: Line) -> dict[str, list[float | int | None]]:
    results = line.method.results
    return {
        "trained_parameters": [result.trained for result in results],
        "adapter_bytes": [result.adapter_bytes for result in results],
        "tokens_per_second": [result.tokens_per_second for result in results],
        "peak_memory_bytes": [result.peak_memory_bytes for result in results],
    }


def _experiment(summary: Summary) -> dict[str, Any]:
    experiment = summary.collection.experiment
    return {
        "name": experiment.name,
        "title": experiment.title,
        "paper_table": experiment.paper_table,
        "preset": experiment.preset,
        "conditions": list(experiment.conditions),
        "methods": methods_paragraphs(summary),
        "missing": [{"row": e.row.name, "part": e.part, "reason": e.reason} for e in summary.collection.missing],
        "groups": [_group(group) for group in summary.groups],
    }


def _group(group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "measures": list(group.measures),
        "selected_by": group.selected_by,
        "lines": [_line(line) for line in group.lines],
        "best": {
            measure: {
                "row": group.chosen[best.place].title,
                "p_holm": best.p_holm,
                "seeds_agree": best.seeds_agree,
                "supported": best.supported,
            }
            for measure, best in group.best.items()
        },
        "verdict": _verdict(group.verdict),
    }


def _line(line: Line) -> dict[str, Any]:
    row, method = line.method.first.row, line.method
    costs = _costs(line)
    return {
        "row": line.title,
        "method": method.name,
        "mode": row.mode,
        "label": row.label,
        "printed": row.printed,
        "rank": row.rank,
        "n_models": row.n_models,
        "learning_rate": row.learning_rate,
        "chosen": line.chosen,
        "seeds": list(method.seeds),
        "rows": [result.row.name for result in method.results],
        "trained_parameters": costs["trained_parameters"][0],
        "adapter_bytes": costs["adapter_bytes"][0],
        "tokens_per_second": costs["tokens_per_second"],
        "peak_memory_bytes": costs["peak_memory_bytes"],
        "paper": line.paper,
        "measures": {
            name: {
                "value": found.value,
                "low": found.low if found.has_interval else None,
                "high": found.high if found.has_interval else None,
                "kind": found.kind,
                "n": found.n,
                "seeds": found.seeds,
                "by_seed": {str(r.row.seed): r.measures[name].value for r in method.with_measure(name)},
            }
            for name, found in line.estimates.items()
        },
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "headline": verdict.headline,
        "rule": verdict.rule,
        "comparisons": [
            {
                "one": comparison.one.name,
                "other": comparison.other.name,
                "role": comparison.role,
                "sentence": comparison.sentence(),
                "tests": [
                    {
                        "measure": test.measure,
                        "difference": test.paired.difference,
                        "ci95": test.paired.ci95 and list(test.paired.ci95),
                        "p": test.paired.p_value,
                        "p_holm": test.p_holm,
                        "n": test.paired.n,
                        "outcome": test.outcome,
                        "seeds": test.seeds,
                        "seeds_agreeing": test.agreeing,
                        "over_seeds": test.over_seeds,
                    }
                    for test in comparison.tests
                ],
            }
            for comparison in verdict.comparisons
        ],
    }
