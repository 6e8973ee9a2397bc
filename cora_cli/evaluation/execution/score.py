"""Run the samples of every problem, each within a time limit that its reference solution sets."""

import math
import os
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cora_cli import writing
from cora_cli.errors import CoraError
from cora_cli.evaluation.execution.problems import Problem, problem_of, say_what_is_not_run
from cora_cli.evaluation.execution.run import FATES, Outcome, run
from cora_cli.evaluation.metrics.pass_at import Attempts
from cora_cli.progress import progress
from cora_cli.rundir import EvaluationDirectory

LEAST_SECONDS, TIMES_REFERENCE = 4, 10
"""A program may take this many times the processor seconds of the reference solution, rounded up, and no less than the first number."""
REFERENCE_SECONDS = 60
MOST_AT_ONCE = 16
CONDITIONS = f"answer:python-block|limit:max({LEAST_SECONDS}s,{TIMES_REFERENCE}xreference)|sandbox:bubblewrap|python:{'.'.join(platform.python_version_tuple()[:2])}"
"""What moves pass@k apart from the programs, for its signature."""


class Executor:
    """Runs programs, several at a time, and remembers the time limit of each problem."""

    def __init__(self) -> None:
        self._limits: dict[Problem, int] = {}

    def calibrate(self, problems: Sequence[Problem]) -> None:
        """Run the reference solution of each problem that is new.

        Raises `CoraError` naming the first one that does not pass, or whose tests every program would pass: its tests could not tell a right program
        from a wrong one.
        """
        new = list(dict.fromkeys(problem for problem in problems if problem not in self._limits))
        if not new:
            return
        outcomes = _in_parallel("reference solutions", [(problem, problem.reference, REFERENCE_SECONDS) for problem in new])
        for problem, outcome in zip(new, outcomes, strict=True):
            if outcome.fate != "passed":
                said = f" ({outcome.detail})" if outcome.detail else ""
                raise CoraError(
                    f"{problem.where}: the reference solution does not pass its own tests here: {outcome.fate}{said}; correct or remove the "
                    "record. Programs have Python's standard library only, and tests run in a process of their own"
                )
            if outcome.detail or not problem.asserts():
                said = outcome.detail or "the tests hold no assertion"
                raise CoraError(
                    f"{problem.where}: every program would pass, since {said}; assert results in statements that are run, such as "
                    "`assert f(1) == 2` (functions and classes of tests are not called by themselves), or remove the record"
                )
            self._limits[problem] = max(LEAST_SECONDS, math.ceil(TIMES_REFERENCE * outcome.seconds))

    def run(self, problems: Sequence[Problem], answers: Sequence[Sequence[str]]) -> list[list[Outcome]]:
        """The outcome of every answer to every problem. Raises `CoraError` as `calibrate` does."""
        self.calibrate(problems)
        programs = [
            (problem, problem.program(answer), self._limits[problem])
            for problem, samples in zip(problems, answers, strict=True)
            for answer in samples
        ]
        # The same program twice has the same fate.
        different = list(dict.fromkeys(programs))
        outcomes = dict(zip(different, _in_parallel("programs", different), strict=True))
        each = iter(programs)
        return [[outcomes[next(each)] for _ in samples] for samples in answers]

    def limit(self, problem: Problem) -> int:
        """The time limit of a problem that was calibrated, in processor seconds."""
        return self._limits[problem]


def execute(
    executor: Executor,
    problems: Sequence[Problem] | None,
    lines: Sequence[dict[str, Any]],
    path: Path,
    out: EvaluationDirectory,
) -> tuple[Attempts, dict[str, int]]:
    """Run the programs in the predictions at `path`, of which `lines` has one per record, and write what became of each.

    Without `problems`, the tests are those that were kept with the predictions. Returns what pass@k counts, and the number of programs of
    each fate.
    """
    say_what_is_not_run([line.get("problem") for line in lines], str(path))
    if problems is None:
        problems = [problem_of(line.get("problem"), f"{path}, record {number}") for number, line in enumerate(lines, start=1)]
    answers = [[sample["prediction"] for sample in line.get("samples") or [line]] for line in lines]
    outcomes = executor.run(problems, answers)
    writing.write_jsonl(
        out.executions,
        [
            {
                "limit_seconds": executor.limit(problem),
                "programs": [{"fate": outcome.fate, "detail": outcome.detail} for outcome in samples],
            }
            for problem, samples in zip(problems, outcomes, strict=True)
        ],
    )
    passed = [sum(outcome.fate == "passed" for outcome in samples) for samples in outcomes]
    return Attempts([len(samples) for samples in outcomes], passed, CONDITIONS), count_fates(outcomes)


def count_fates(outcomes: Sequence[Sequence[Outcome]]) -> dict[str, int]:
    """How many programs had each fate; fates that none had are left out."""
    found = [outcome.fate for samples in outcomes for outcome in samples]
    return {fate: found.count(fate) for fate in FATES if fate in found}


def _in_parallel(what: str, programs: Sequence[tuple[Problem, str, int]]) -> list[Outcome]:
    outcomes = []
    with (
        progress(what, len(programs), "programs") as shown,
        ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), MOST_AT_ONCE)) as pool,
    ):
        try:
            for outcome in pool.map(lambda one: run(*one), programs):
                outcomes.append(outcome)
                shown.advance()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return outcomes
