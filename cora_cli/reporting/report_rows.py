"""The rows of a report, and those that a grid's `plan.json` lists; `collect` reads their numbers."""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cora_cli import records
from cora_cli.errors import CoraError
from cora_cli.experiments.ledger import Ledger
from cora_cli.experiments.plan_record import read_steps
from cora_cli.experiments.steps import Step
from cora_cli.reading import checked, number
from cora_cli.records import PLAN, read_sealed
from cora_cli.rundir import RunDirectory, evaluations_in

PLAN_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Row:
    """One planned run and its evaluation. Rows of one `group` share data and evaluation and are compared with each other.

    `n_models` is the number of models behind the basis, 0 for the base model alone. `run` is None if nothing was trained. `logs` is the
    directory of log files that may explain a failure. `stage` is "sweep" for a run that only helped to choose a learning rate. `members` are the
    runs behind an evaluation of their average.
    """

    name: str
    printed: str | None
    group: str
    mode: str
    label: str
    rank: int | None
    n_models: int | None
    sources: tuple[str, ...]
    learning_rate: float | None
    seed: int
    model: str
    dataset: str
    run: Path | None
    evaluation: Path | None
    basis: Path | None
    logs: Path | None = None
    stage: str | None = None
    members: tuple[Path, ...] = ()

    @property
    def identity(self) -> tuple[object, ...]:
        """The settings that identify a method, without its learning rate."""
        return (self.group, self.label, self.printed, self.mode, self.rank, self.n_models, self.model, self.dataset)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A grid, or several plain directories. `conditions` are sentences on the differences from the paper.

    `margin` is the grid's margin of equivalence: a share of what training gains, or margins by measure, or None for the default.
    `sweeps` has the sweep of each method, as `records.PlannedSweep`, of a grid that sweeps and then confirms, and `looks` the number of times
    that it looks at its confirming seeds. `judgings` are directories of `cora judge` that were named themselves; rows have theirs inside.
    """

    name: str
    title: str
    paper_table: str | None
    preset: str | None
    conditions: tuple[str, ...]
    rows: tuple[Row, ...]
    bases: tuple[Path, ...] = ()
    records: "StepRecords | None" = None
    margin: float | dict[str, float] | None = None
    sweeps: tuple[dict[str, Any], ...] = ()
    looks: int | None = None
    judgings: tuple[Path, ...] = ()


class StepRecords:
    """The step records of `cora ablate`, which tell whether an output is still the one that its step wrote."""

    def __init__(self, root: Path, steps: dict[str, Step]) -> None:
        self._ledger, self._steps = Ledger(root), steps
        self._by_place = {root / step.output: step for step in steps.values()}

    def has_finished(self, place: Path) -> bool:
        """Whether the step of the plan that writes `place` has once finished, whatever became of its files."""
        step = self._by_place.get(place)
        return step is not None and self._ledger.has_finished(step)

    def require(self, place: Path) -> None:
        """Raise `CoraError` with the reason if the directory or file at `place` is not the valid output of a step of the plan."""
        step = self._by_place.get(place)
        objection = self._ledger.objection(step, self._steps) if step else f"{place} is not the output of a step of the plan"
        if objection:
            raise CoraError(f"{objection}; run `cora ablate` again")


def _of_other_plans(root: Path, steps: Mapping[str, Step]) -> list[str]:
    """A sentence on runs in a grid's directory that its plan does not have, such as those of another grid or of a row that was removed."""
    own = {step.output for step in steps.values()}
    runs = [f"runs/{place.name}" for place in sorted((root / "runs").glob("[!.]*")) if RunDirectory(place).exists()]
    others = [run for run in runs if run not in own] if steps else []
    if not others:
        return []
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    return [
        f"The plan of the last `cora ablate` in {root} does not have {clean(others[0])}{more}, which this report leaves out."
    ]


def _of_other_evaluations(root: Path, rows: Sequence[Row]) -> list[str]:
    """A sentence on evaluations in the runs of a grid that its plan does not have, such as those of other records."""
    own = {row.evaluation for row in rows}
    runs = [RunDirectory(run) for run in dict.fromkeys(row.run for row in rows) if run is not None and run.is_dir()]
    found = [one.root for run in runs for one in evaluations_in(run)]
    others = [clean(str(place.relative_to(root))) for place in found if place not in own]
    if not others:
        return []
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    return [
        f"The plan in {root} does not have the evaluation {others[0]}{more}, which this report leaves out; name it alone to report it."
    ]


def _own_bases(root: Path, steps: Mapping[str, Step]) -> list[Path]:
    """The basis files of a grid, without those of earlier plans, which no row has; all of them where the plan lists no steps."""
    own = {root / step.output for step in steps.values()}
    return [path for path in sorted((root / "bases").glob("*.safetensors")) if path in own or not steps]


def _of_later_seeds(before: Sequence[int]) -> list[str]:
    """A sentence on seeds that were planned when results of others existed; `before` has how many these were, each time."""
    if not before:
        return []
    return [
        f"Seeds were added when {' and then '.join(map(str, before))} per method had results. The tests assume a number of seeds that was fixed before: "
        "adding seeds until a difference shows finds one more often than the level says. A grid with confirm plans its looks at the results."
    ]


def read_plan(root: Path) -> Experiment:
    """The experiment described by `root/plan.json`. Raises `CoraError` with the file and the fault."""
    path = root / PLAN
    try:
        plan = read_sealed(path, remedy="")
        version = plan.get("format_version")
        is_ours = type(version) is int and version == PLAN_VERSION
        if is_ours:
            checked(plan, records.GridPlan, path)
            _check_sweeps(plan.get("sweeps", ()), path)
    except CoraError as error:
        raise CoraError(f"{error}; run `cora ablate` again") from error
    if not is_ours:
        raise CoraError(f"{path} has format version {version!r}, but this cora reads version {PLAN_VERSION}")
    rows = [_row_of_plan(root, entry) for entry in plan["rows"]]
    names = Counter(row.name for row in rows)
    steps = read_steps(plan)
    unchecked = (
        ()
        if steps
        else ("These rows were not checked against the records of `cora ablate`, because plan.json lists no steps.",)
    )
    if not rows:
        raise CoraError(f"{path} plans no rows, so there is nothing to report")
    if repeated := sorted(name for name, count in names.items() if count > 1):
        raise CoraError(f"{path} is damaged: two rows are named {repeated[0]}; run `cora ablate` again")
    judgings, lacking = _own_judgings(root, steps)
    return Experiment(
        clean(plan["name"]),
        clean(plan["title"]),
        plan["paper_table"],
        plan["preset"],
        (
            *(clean(str(sentence)) for sentence in plan["conditions"]),
            *unchecked,
            *lacking,
            *_of_other_plans(root, steps),
            *_of_other_evaluations(root, rows),
            *_of_later_seeds(plan.get("seeds_before", ())),
        ),
        tuple(rows),
        tuple(_own_bases(root, steps)),
        StepRecords(root, steps) if steps else None,
        plan.get("margin"),
        tuple(plan.get("sweeps", ())),
        plan.get("looks"),
        tuple(judgings),
    )


def _check_sweeps(sweeps: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Raise `CoraError` for a sweep whose losses are not under learning rates."""
    for rate in (rate for sweep in sweeps for rate in sweep["losses"]):
        if number(rate) is None:
            raise CoraError(f"{path} is damaged: sweeps has losses at {rate!r}, which is no learning rate")


def _own_judgings(root: Path, steps: dict[str, Step]) -> tuple[list[Path], list[str]]:
    """The judgings of a grid that belong to its answers, and a sentence for each of the others."""
    places, lacking = [], []
    for step in (step for step in steps.values() if step.kind == "judge"):
        try:
            StepRecords(root, steps).require(root / step.output)
        except CoraError as error:
            lacking.append(f"The scores of {step.output} are left out: {error}.")
        else:
            places.append(root / step.output)
    return places, lacking


def clean(text: str) -> str:
    """`text` on one line without control characters, which are invalid in SVG and LaTeX."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]+", " ", text).strip()


def _row_of_plan(root: Path, entry: dict[str, Any]) -> Row:
    texts: dict[str, Any] = {
        key: clean(str(entry[key] or "")) for key in ("name", "group", "mode", "label", "model", "dataset")
    }
    paths: dict[str, Any] = {key: root / entry[key] if entry[key] else None for key in ("run", "evaluation", "basis")}
    return Row(
        **texts,
        **paths,
        printed=entry["printed"] and clean(entry["printed"]),
        rank=entry["rank"],
        n_models=entry["n_models"],
        sources=tuple(clean(str(source)) for source in entry["sources"]),
        learning_rate=entry["learning_rate"],
        seed=entry["seed"],
        logs=root / "logs",
        stage=entry.get("stage"),
        members=tuple(root / place for place in entry.get("members", ())),
    )
