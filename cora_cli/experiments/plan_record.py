"""The contents of plan.json: the rows and steps of a grid, for what reads its results."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from cora_cli.experiments.steps import PLAN_FORMAT, Plan, Step


def plan_record(plan: Plan) -> dict[str, Any]:
    """The contents of `plan.json`: the rows, and where their files are, for `cora report`."""
    grid = plan.grid
    rows = []
    for row in grid.rows:
        if row.stage == "proposal":  # it has no result to report
            continue
        run, evaluation, basis = (plan.of_kind(row.name, kind) for kind in ("train", "evaluate", "basis"))
        run = plan.of_kind(row.name, "laplace") or run
        steps = [plan.steps[name] for name in plan.steps_of[row.name]]
        averaged = [step.output for step in steps if step.kind == "train"] if row.ensemble and row.stage != "sweep" else []
        names = [grid.models[name] for name in row.sources]
        sources = [value if isinstance(value, str) else value["dataset"] for value in names]
        rows.append(
            {
                "name": row.name,
                "printed": row.printed,
                "group": row.dataset,
                "mode": row.shown_mode,
                "label": row.label,
                "rank": row.rank,
                "n_models": row.n_models,
                "sources": sources,
                "learning_rate": row.learning_rate,
                "seed": row.seed,
                "stage": row.stage,
                "model": grid.model,
                "dataset": row.dataset and grid.datasets[row.dataset],
                "run": run and run.output if not averaged else None,
                **({"members": averaged} if averaged else {}),
                "evaluation": evaluation and evaluation.output,
                "basis": basis and basis.output,
            }
        )
    return {
        "format_version": PLAN_FORMAT,
        "name": grid.name,
        "title": grid.title,
        "paper_table": grid.paper_table,
        "preset": grid.preset,
        "conditions": list(grid.conditions),
        "margin": grid.margin,
        "template_date": plan.date,
        **plan.texts,
        "rows": rows,
        "steps": [dataclasses.asdict(step) for step in plan.steps.values()],
    }


def read_steps(record: Mapping[str, Any]) -> dict[str, Step]:
    """The steps of a `plan_record` by name, each after its dependencies; empty if the record has none."""
    keys = [field.name for field in dataclasses.fields(Step)]
    entries = [{key: entry[key] for key in keys if key in entry} for entry in record.get("steps", ())]
    return {entry["name"]: Step(**{**entry, "needs": tuple(entry["needs"]), "argv": tuple(entry["argv"])}) for entry in entries}
