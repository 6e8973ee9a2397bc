"""Finds the experiments in the directories that a report is of."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from cora_cli.records import PLAN
from cora_cli.reporting.inventory import not_an_output, outputs_below
from cora_cli.reporting.plain_rows import labelled, row_of_evaluation, row_of_run, with_ranks
from cora_cli.reporting.report_rows import Experiment, Row, clean, read_plan
from cora_cli.rundir import EvaluationDirectory, JudgeDirectory, RunDirectory

PLAIN = "finished runs"
"""The name of the experiment that collects all plain directories."""


def find_experiments(outputs: Sequence[str]) -> list[Experiment]:
    """The experiments in the directories: one per grid, and one for all plain runs and evaluations together.

    Runs bring the evaluation of their base model, where `cora evaluate --with-base` left one. A directory counts once, however often and by whichever path it is named. Raises `CoraError` if one is none of these, if a plan is
    damaged, and for copies of one run.
    """
    planned: dict[Path, Experiment] = {}
    plain: list[Row] = []
    judgings: list[Path] = []
    for root in _distinct_directories(with_ranks([Path(output) for output in opened(outputs)])):
        if (root / PLAN).is_file():
            planned[root] = read_plan(root)
        elif RunDirectory(root).exists():
            plain.append(row_of_run(RunDirectory(root)))
        elif EvaluationDirectory(root).metrics.is_file():
            plain.append(row_of_evaluation(EvaluationDirectory(root)))
        elif JudgeDirectory(root).result.is_file():
            judgings.append(root)
        else:
            raise not_an_output(root)
    grids = _told_apart(planned)
    if len(grids) == 1 and not plain:
        # Judgments of a grid's models are reported with their rows, which know the paper's names.
        return [dataclasses.replace(grids[0], judgings=(*grids[0].judgings, *judgings))]
    if plain or judgings:
        title = "Finished runs" if plain else "Judged answers"
        grids.append(Experiment(PLAIN, title, None, None, (), tuple(labelled(plain)), judgings=tuple(judgings)))
    return grids


def _told_apart(planned: Mapping[Path, Experiment]) -> list[Experiment]:
    """The experiments of grids; those of one name, such as of one grid file in two directories, get the directory as a part of it."""
    names = Counter(grid.name for grid in planned.values())
    return [
        dataclasses.replace(grid, name=f"{grid.name} in {clean(str(root))}", title=f"{grid.title} in {clean(str(root))}")
        if names[grid.name] > 1
        else grid
        for root, grid in planned.items()
    ]


def opened(outputs: Sequence[str]) -> list[str]:
    """The directories with a folder of outputs replaced by what is below it."""
    opened: list[str] = []
    for output in outputs:
        root = Path(output)
        below = outputs_below(root) if root.is_dir() else []
        opened += [output] if not below or below == [root] else map(str, below)
    return opened


def _distinct_directories(outputs: Sequence[Path]) -> list[Path]:
    found: dict[Path, Path] = {}
    for output in outputs:
        found.setdefault(output.resolve(), output)
    return list(found.values())
