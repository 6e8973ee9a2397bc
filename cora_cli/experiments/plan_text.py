"""The plan and the outcome of a grid as text."""

from collections import Counter
from collections.abc import Mapping

from cora_cli.experiments.estimate import (
    ESTIMATE_NOTE,
    NO_TIME_NOTE,
    Estimate,
    seconds_of,
    trained_parameters,
)
from cora_cli.experiments.execute import (
    Outcome,
    last_lines,
    log_of,
)
from cora_cli.experiments.inputs import Inputs
from cora_cli.experiments.screen import duration
from cora_cli.experiments.steps import Kind, Plan
from cora_cli.experiments.trainings import (
    GridMemory,
    memory_cell,
    memory_notes,
    volume_table,
)
from cora_cli.render.table import Cell, table_text

_NOUNS: dict[Kind, tuple[str, str]] = {
    "model": ("fine-tune for the bases", "fine-tunes for the bases"),
    "basis": ("basis", "bases"),
    "proposal": ("proposal of a learning rate", "proposals of learning rates"),
    "train": ("training run", "training runs"),
    "laplace": ("Laplace approximation", "Laplace approximations"),
    "evaluate": ("evaluation", "evaluations"),
    "judge": ("judging", "judgings"),
}


def render_plan(
    plan: Plan,
    inputs: Inputs,
    done: Mapping[str, bool],
    estimates: Mapping[str, Estimate],
    chosen: list[str],
    machine: str,
    memory: GridMemory,
    width: int | None = None,
) -> str:
    """The plan as Markdown, whose table has lines of at most `width` characters."""
    grid = plan.grid
    model = inputs.models.get(grid.model)
    rows, shown = [], set(chosen)
    for row in grid.rows:
        if row.name not in shown:
            continue
        trained = trained_parameters(row, model)
        seconds = seconds_of(estimates, plan.steps_of[row.name])
        rows.append(
            [
                row.name,
                row.printed or "-",
                "unknown" if trained is None else f"{trained:,}",
                "unknown" if seconds is None else duration(seconds),
                memory_cell(row, memory),
                "done" if all(done[name] for name in plan.steps_of[row.name]) else "to do",
            ]
        )
    wanted = plan.needed_for(chosen)
    users = Counter(name for row in grid.rows for name in plan.needed_for([row.name]))
    lines = [grid.title, f"base model {grid.model}, output in {plan.out}", ""]
    lines += [f"- {condition}" for condition in grid.conditions]
    headers = ("row", "printed as", "trained parameters", "time", "memory", "state")
    lines += ["", table_text(headers, [list(map(Cell, row)) for row in rows], width), "", *volume_table(memory, width)]
    lines += [
        _step_line(plan, kind, wanted, users, done, estimates)
        for kind in _NOUNS
        if any(plan.steps[n].kind == kind for n in wanted)
    ]
    todo = [name for name in plan.steps if name in wanted and not done[name]]
    total, left = (seconds_of(estimates, names) for names in (wanted, todo))
    if not wanted:
        lines.append("no steps: these rows run nothing")
    elif total is not None and left is not None:
        lines.append(
            f"all steps: about {duration(total)} if run one at a time, of which {duration(left)} remain (this machine: {machine})"
        )
    if wanted:
        note = (
            f"{ESTIMATE_NOTE}; each row counts all of its steps, including shared ones, but not the fine-tunes behind its basis"
            if machine
            else NO_TIME_NOTE
        )
        lines.append(note)
    lines += [
        *memory_notes(plan, chosen, memory, estimates),
        *(f"unresolved: {reference} ({reason})" for reference, reason in inputs.unresolved.items()),
    ]
    return "\n".join(lines)


def _step_line(
    plan: Plan,
    kind: Kind,
    wanted: set[str],
    users: Mapping[str, int],
    done: Mapping[str, bool],
    estimates: Mapping[str, Estimate],
) -> str:
    names = [name for name in plan.steps if name in wanted and plan.steps[name].kind == kind]
    shared = sum(users[name] > 1 for name in names)
    seconds = seconds_of(estimates, names)
    time = "" if seconds is None else f", about {duration(seconds)}"
    finished = sum(done[name] for name in names)
    noun = _NOUNS[kind][len(names) != 1]
    return f"{len(names)} {noun}{f' ({shared} shared by several rows)' if shared else ''}{time}; {finished} done"


def summary(plan: Plan, outcome: Outcome) -> str:
    """How the grid ended, with the last lines of the log of each failed step."""
    steps = "step" if len(outcome.completed) == 1 else "steps"
    lines = [f"{len(outcome.completed)} {steps} completed, {len(outcome.up_to_date)} already up to date, in {plan.out}"]
    if not outcome.completed and not outcome.failed and not outcome.blocked:
        lines = [f"All {len(outcome.up_to_date)} steps are up to date. Results: {plan.out}"]
    for name in outcome.failed:
        log = log_of(plan, plan.steps[name])
        lines += [f"{name} failed; last lines of {log}:", *(f"    {line}" for line in last_lines(log))]
    lines += [f"{name} was skipped, because {culprit} failed" for name, culprit in outcome.blocked.items()]
    return "\n".join(lines)
