"""Writes reports for other programs: a tidy CSV of all measures, and JSON with the complete report.

JSON: `{"format_version": 2, "experiments": [...]}`. An experiment has `name`, `title`, `paper_table`, `preset`, `conditions`, `methods`
(the paragraphs), `missing` (`row`, `part`, `reason`), `judged` (each `judge.json`) and `groups`. A group has `name`, `measures`, `selected_by`, `lines`, `best` and `verdict`:

- a line: `row` (title), `method`, `mode`, `label`, `printed`, `rank`, `n_models`, `learning_rate`, `chosen`, `seeds`, `rows` (names), `results` (the `result_sha256` of
  each row's run),
  `trained_parameters`, `adapter_bytes`, `tokens_per_second` and `peak_memory_bytes` (a value per seed), `paper` (measure -> number), and
  `measures`: measure -> `value`, `low`, `high`, `kind`, `n`, `seeds`, `by_seed`;
- `best`: measure -> `row`, `p_holm` (null where a test has none), `supported`;
- `verdict`: `headline`, `rule`, `comparisons`, each with `one`, `other`, `role`, `control` (whether it is the random control's line below a
  LoRA), `baseline` (whether it compares another method with LoRA), `uncontrolled` (whether an informed B is compared with LoRA without a random control), `sentence` and `tests`: `measure`, `difference`, `ci95`, `ci90`, `p`, `p_holm`, `n` (records), `outcome`, `obstacle` (why nothing can be
  decided, or empty), `seeds` (of both sides, null for a model without seeds), `finished` (those of both methods before pairing), `paired`, `kind`, `components` (the parts of the variance of
  the difference: `seed`, `record`, `interaction`), `margin`, `more_seeds` and `more_records` (which would decide, or null).

Version 2 replaced the tests over prompts (`seeds_agree`, `seeds_agreeing`, `over_seeds`) by those over seeds and records. In the CSV, a test
has `outcome` and the other columns of its group at the end; its `row` is `one minus other`, and its `value` the difference. A judge's scores have the judge, with the directory where several have its name, as
`method` and `RUBRIC.CRITERION` as `measure`.

`heldout_loss` and `nll` are in nats per response token, `sacrebleu` 0-100, `brier` 0-2, the other measures 0-1.
"""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from cora_cli.records import sealed
from cora_cli.reporting.comparison import Comparison
from cora_cli.reporting.judge_section import papers_scores
from cora_cli.reporting.methods_section import methods_paragraphs
from cora_cli.reporting.outcomes import Test
from cora_cli.reporting.results import Judged, places_apart
from cora_cli.reporting.summary import Group, Line, Summary
from cora_cli.reporting.verdict import Verdict

FORMAT_VERSION = 2
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
    "role",
    "low90",
    "high90",
    "p",
    "p_holm",
    "margin",
    "outcome",
    "more_seeds",
    "more_records",
    "seed_variance",
    "record_variance",
    "interaction_variance",
)


def to_csv(summaries: Sequence[Summary]) -> str:
    """One line per method, learning rate and measure, then one per test of the verdict, in full precision.

    Costs count as measures, as means over seeds.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for summary in summaries:
        for group in summary.groups:
            for line in group.lines:
                writer.writerows(_csv_rows(summary.collection.experiment.name, group, line))
            for comparison in group.verdict.comparisons:
                writer.writerows(_csv_tests(summary.collection.experiment.name, group, comparison))
        for judged, place in zip(summary.collection.judged, places_apart(summary.collection.judged), strict=True):
            writer.writerows(_csv_judged(summary.collection.experiment.name, judged, place))
    return out.getvalue()


def to_json(summaries: Sequence[Summary]) -> str:
    """The complete report as JSON; the module docstring describes the keys."""
    report = {"format_version": FORMAT_VERSION, "experiments": [_experiment(summary) for summary in summaries]}
    return json.dumps(sealed(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


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
                "low": repr(found.ci95[0]) if found.ci95 else "",
                "high": repr(found.ci95[1]) if found.ci95 else "",
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


def _csv_tests(experiment: str, group: Group, comparison: Comparison) -> list[dict[str, Any]]:
    rows = []
    for test in comparison.tests:
        found = test.found
        low, high = found.ci95 or (None, None)
        low90, high90 = found.ci90 or (None, None)
        rows.append(
            {
                "experiment": experiment,
                "group": group.name,
                "row": f"{comparison.one.name} minus {comparison.other.name}",
                "measure": test.measure,
                "value": repr(found.difference),
                "low": low,
                "high": high,
                "kind": found.kind,
                "n": found.n,
                "seeds": found.fewest_seeds,
                "role": f"control: {comparison.role}" if comparison.control else comparison.role,
                "low90": low90,
                "high90": high90,
                "p": found.p_value,
                "p_holm": test.p_holm,
                "margin": test.margin,
                "outcome": test.outcome,
                "more_seeds": test.more_seeds,
                "more_records": test.more_records,
                "seed_variance": found.seed_variance,
                "record_variance": found.record_variance,
                "interaction_variance": found.interaction_variance,
            }
        )
    return [{key: _safe(value) for key, value in entry.items()} for entry in rows]


def _csv_judged(experiment: str, judged: Judged, place: str) -> list[dict[str, Any]]:
    """Scores and win rates, as the judge gave them; a disqualified judge's are told by the `kind`."""
    judge = ", ".join(filter(None, (judged.record["judge"]["model"], place)))
    found: list[tuple[str, str, str, Any, float | None]] = []
    for name, rubric in judged.record["rubrics"].items():
        kind = "disqualified judge" if rubric["disqualified"] else "judge"
        for key, entry in rubric["criteria"].items():
            for answers, score in entry["scores"].items():
                paper = papers_scores(name, judged.printed.get(answers, answers)).get(key)
                found.append((kind, answers, f"{name}.{key}", score, paper))
        for names, share in (rubric["pairs"] or {"wins": {}})["wins"].items():
            found.append((kind, names, f"{name}.wins", share["observed"], None))
    rows = []
    for kind, answers, measure, score, paper in found:
        if score is not None:
            low, high = score["ci95"] or (None, None)
            row = {"experiment": experiment, "group": judged.group, "row": answers, "method": judge, "measure": measure}
            rows.append(
                {**row, "value": score["value"], "low": low, "high": high, "kind": kind, "n": score["n"], "paper": paper}
            )
    return [{key: _safe(value) for key, value in row.items()} for row in rows]


def _safe(value: Any) -> Any:
    """Quote text that a spreadsheet would take for a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "@")) else value


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
        "judged": [judged.record for judged in summary.collection.judged],
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
        "results": [result.record.get("result_sha256") for result in method.results],
        "trained_parameters": costs["trained_parameters"][0],
        "adapter_bytes": costs["adapter_bytes"][0],
        "tokens_per_second": costs["tokens_per_second"],
        "peak_memory_bytes": costs["peak_memory_bytes"],
        "paper": line.paper,
        "measures": {
            name: {
                "value": found.value,
                "low": found.ci95[0] if found.ci95 else None,
                "high": found.ci95[1] if found.ci95 else None,
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
                "control": comparison.control,
                "baseline": comparison.baseline,
                "uncontrolled": comparison.uncontrolled,
                "tests": [_test(test) for test in comparison.tests],
            }
            for comparison in verdict.comparisons
        ],
    }


def _test(test: Test) -> dict[str, Any]:
    found = test.found
    return {
        "measure": test.measure,
        "difference": found.difference,
        "ci95": found.ci95 and list(found.ci95),
        "ci90": found.ci90 and list(found.ci90),
        "p": found.p_value,
        "p_holm": test.p_holm,
        "n": found.n,
        "outcome": test.outcome,
        "obstacle": test.obstacle,
        "seeds": list(found.seeds),
        "finished": list(found.finished),
        "paired": found.paired,
        "kind": found.kind,
        "components": {
            "seed": found.seed_variance,
            "record": found.record_variance,
            "interaction": found.interaction_variance,
        },
        "margin": test.margin,
        "more_seeds": test.more_seeds,
        "more_records": test.more_records,
    }
